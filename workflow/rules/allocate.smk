"""Plans: one option for each matrix within a budget; the best of the near-optimal ones is chosen by select KL."""


rule allocate:
    input:
        costs=routed("fit", "results/{model}/costs.{route}.parquet"),
        sensitivity="results/{model}/sensitivity.parquet",
        inventory="results/{model}/inventory.parquet",
        embeddings=embeddings,
        verdicts=["results/{model}/gates/sweep.json", "results/{model}/gates/fit.json"],
    output:
        plans="results/{model}/candidates.parquet",
        folder=directory("results/{model}/candidates"),
    log:
        "logs/{model}/allocate.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        settings=section("allocate", "export", "sensitivity", "sweep", "seed"),
        code=code("allocate"),
    script:
        "../../scripts/allocate.py"


rule allocate_best:
    input:
        plans="results/{model}/candidates.parquet",
        folder="results/{model}/candidates",
        select="results/{model}/select.parquet",
    output:
        plans="results/{model}/plans.parquet",
        folder=directory("results/{model}/plans"),
    log:
        "logs/{model}/allocate_best.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        code=code("allocate"),
    script:
        "../../scripts/allocate_best.py"
