"""Which level of what was promised is reached."""


rule success:
    input:
        plans="results/{model}/plans.parquet",
        evaluate="results/{model}/evaluate.parquet",
        goodhart="results/{model}/goodhart.parquet",
        law="results/{model}/law.parquet",
        gates="results/{model}/gates.parquet",
    output:
        "results/{model}/success.parquet",
    log:
        "logs/{model}/success.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        settings=section("fit"),
        code=code("success"),
    script:
        "../../scripts/success.py"
