"""Scores: candidates on the select split, then every plan on the report split and the tasks."""


rule evaluate_select:
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
        "results/{model}/select.parquet",
    log:
        "logs/{model}/evaluate_select.log",
    conda:
        "../../envs/bitalloc.yaml"
    threads: threads
    resources:
        gpu=gpu,
    params:
        settings=section("evaluate", "sweep", "store", "device", "seed"),
        split="select",
        code=code("evaluate"),
    script:
        "../../scripts/evaluate_select.py"


rule evaluate:
    input:
        compress=passed("compress"),
        allocate="results/{model}/gates/allocate.json",
        checkpoint="results/{model}/checkpoint.json",
        inventory="results/{model}/inventory.parquet",
        moments="results/{model}/moments.parquet",
        embeddings=embeddings,
        tokens="results/{model}/tokens.parquet",
        items_table="results/{model}/items.parquet",
        plans="results/{model}/plans.parquet",
        folder="results/{model}/plans",
        checkpoints="results/{model}/checkpoints.parquet",
    output:
        scores="results/{model}/evaluate/{part}.parquet",
        responses="results/{model}/evaluate/{part}.responses.parquet",
    log:
        "logs/{model}/evaluate/{part}.log",
    conda:
        "../../envs/bitalloc.yaml"
    threads: threads_shared
    resources:
        gpu=gpu,
    params:
        settings=section("evaluate", "sweep", "store", "device", "seed"),
        code=code("evaluate"),
    script:
        "../../scripts/evaluate.py"


use rule evaluate as evaluate_cost with:
    output:
        cost="results/{model}/cost.parquet",
    log:
        "logs/{model}/evaluate_cost.log",


rule evaluate_merge:
    input:
        scores=evaluate_parts("results/{model}/evaluate/{part}.parquet"),
        responses=evaluate_parts("results/{model}/evaluate/{part}.responses.parquet"),
    output:
        scores="results/{model}/evaluate.parquet",
        responses="results/{model}/responses.parquet",
    log:
        "logs/{model}/evaluate_merge.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        code=code("tables"),
    script:
        "../../scripts/evaluate_merge.py"


rule evaluate_protocols:
    input:
        compress=passed("compress"),
        checkpoint="results/{model}/checkpoint.json",
        inventory="results/{model}/inventory.parquet",
        moments="results/{model}/moments.parquet",
        embeddings=embeddings,
        readings="results/{model}/readings.parquet",
        items_table="results/{model}/items.parquet",
        plans="results/{model}/plans.parquet",
        folder="results/{model}/plans",
        checkpoints="results/{model}/checkpoints.parquet",
    output:
        "results/{model}/protocols.parquet",
    log:
        "logs/{model}/evaluate_protocols.log",
    conda:
        "../../envs/bitalloc.yaml"
    threads: threads
    resources:
        gpu=gpu,
    params:
        settings=section("evaluate", "sweep", "store", "device", "seed"),
        code=code("evaluate"),
    script:
        "../../scripts/evaluate_protocols.py"
