"""Does perplexity tell the truth about the tasks?"""


rule analyze:
    input:
        plans="results/{model}/plans.parquet",
        evaluate="results/{model}/evaluate.parquet",
        responses="results/{model}/responses.parquet",
        gates="results/{model}/gates.parquet",
    output:
        table="results/{model}/goodhart.parquet",
        figure=report("results/{model}/goodhart.png", caption="../report/goodhart.rst", category="{model}"),
    log:
        "logs/{model}/analyze.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        settings=section("analyze", "retrieve", "seed"),
        code=code("analyze", "figures"),
    script:
        "../../scripts/analyze.py"
