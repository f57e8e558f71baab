"""Error laws, and what every option costs by the law and by interpolation."""


rule fit:
    input:
        sweep=gated("sweep", lambda wildcards: f"results/{wildcards.model}/sweep.parquet"),
        inventory="results/{model}/inventory.parquet",
        verdict="results/{model}/gates/sweep.json",
    output:
        law="results/{model}/law.parquet",
        costs_law="results/{model}/costs.law.parquet",
        costs_interpolation="results/{model}/costs.interpolation.parquet",
        residuals="results/{model}/residuals.parquet",
    log:
        "logs/{model}/fit.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        settings=section("fit", "sweep", "seed"),
        code=code("fit"),
    script:
        "../../scripts/fit.py"
