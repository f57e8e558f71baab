"""Plans: one option for each matrix within a budget; the best of the near-optimal ones is chosen by select KL."""


rule allocate:
    input:
        costs=routed("fit", "results/{model}/costs.{route}.parquet"),
        sensitivity="results/{model}/sensitivity.parquet",
        inventory="results/{model}/inventory.parquet",
        embeddings=embeddings,
        leaked=leaked("sensitivity.parquet"),
        languages=languages,
        files=lambda wildcards: own_plans(wildcards.model),
        verdicts=["results/{model}/gates/sweep.json", "results/{model}/gates/fit.json"],
    output:
        plans="results/{model}/candidates.parquet",
        folder=directory("results/{model}/candidates"),
    log:
        "logs/{model}/allocate.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        settings=section("allocate", "export", "sensitivity", "sweep", "fairness", "seed"),
        code=code("allocate"),
    script:
        "../../scripts/allocate.py"


rule allocate_leaked:
    input:
        verdict=passed("allocate"),
        checkpoint="results/{model}/checkpoint.json",
        inventory="results/{model}/inventory.parquet",
        moments="results/{model}/moments.parquet",
        embeddings=embeddings,
        tokens="results/{model}/tokens.parquet",
        items_table="results/{model}/items.parquet",
        plans="results/{model}/candidates.parquet",
        folder="results/{model}/candidates",
    output:
        "results/{model}/leaked/evaluate.parquet",
    log:
        "logs/{model}/allocate_leaked.log",
    conda:
        "../../envs/bitalloc.yaml"
    threads: threads
    resources:
        gpu=gpu,
    params:
        settings=section("evaluate", "sweep", "store", "device", "seed"),
        split="report",
        code=code("evaluate"),
    script:
        "../../scripts/evaluate_select.py"


rule allocate_best:
    input:
        plans="results/{model}/candidates.parquet",
        folder="results/{model}/candidates",
        select="results/{model}/select.parquet",
        leaked=leaked("evaluate.parquet"),
    output:
        plans="results/{model}/plans.parquet",
        folder=directory("results/{model}/plans"),
    log:
        "logs/{model}/allocate_best.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        settings=section("compress"),
        code=code("allocate"),
    script:
        "../../scripts/allocate_best.py"
