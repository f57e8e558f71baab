"""Rank versus bits at equal bytes: predicted matrix by matrix, and measured plan against plan."""


rule phase:
    input:
        sweep="results/{model}/sweep.parquet",
        sensitivity="results/{model}/sensitivity.parquet",
        inventory="results/{model}/inventory.parquet",
        plans="results/{model}/plans.parquet",
        folder="results/{model}/plans",
        responses="results/{model}/responses.parquet",
        gates="results/{model}/gates.parquet",
    output:
        phase="results/{model}/phase.parquet",
        controls="results/{model}/controls.parquet",
        figure=report("results/{model}/phase.png", caption="../report/phase.rst", category="{model}"),
    log:
        "logs/{model}/phase.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        settings=section("evaluate", "sensitivity", "seed"),
        code=code("phase", "figures"),
    script:
        "../../scripts/phase.py"
