"""Weights and activations in few bits: what every scheme costs, and in which module."""


rule schemes:
    input:
        checkpoint="results/{model}/checkpoint.json",
        inventory="results/{model}/inventory.parquet",
        tokens="results/{model}/tokens.parquet",
    output:
        "results/{model}/schemes.parquet",
    log:
        "logs/{model}/schemes.log",
    conda:
        "../../envs/bitalloc.yaml"
    threads: threads
    resources:
        gpu=gpu,
    params:
        settings=section("schemes", "evaluate", "store", "device", "seed"),
        sheet=sheet,
        code=code("schemes.ladder"),
    script:
        "../../scripts/schemes.py"


rule schemes_layerwise:
    input:
        checkpoint="results/{model}/checkpoint.json",
        inventory="results/{model}/inventory.parquet",
        tokens="results/{model}/tokens.parquet",
    output:
        "results/{model}/layerwise.parquet",
    log:
        "logs/{model}/schemes_layerwise.log",
    conda:
        "../../envs/bitalloc.yaml"
    threads: threads
    resources:
        gpu=gpu,
    params:
        settings=section("schemes", "evaluate", "store", "device", "seed"),
        sheet=sheet,
        code=code("schemes.layerwise"),
    script:
        "../../scripts/schemes_layerwise.py"
