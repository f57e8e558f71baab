"""Simulated against real: one plan in every backend, each in a process of its own."""


rule backends:
    input:
        checkpoint="results/{model}/checkpoint.json",
        tokens="results/{model}/tokens.parquet",
        folder="results/{model}/models/{plan}",
        plans="results/{model}/plans.parquet",
    output:
        "results/{model}/backends/{plan}/{backend}.parquet",
    log:
        "logs/{model}/backends/{plan}/{backend}.log",
    conda:
        "../../envs/bitalloc.yaml"
    threads: threads
    resources:
        gpu=gpu,
    params:
        settings=section("evaluate", "device", "seed"),
        sheet=sheet,
        code=code("backends"),
    script:
        "../../scripts/backends.py"


rule backends_merge:
    input:
        backends_parts,
    output:
        table="results/{model}/backends.parquet",
        figure=report("results/{model}/backends.png", caption="../report/backends.rst", category="{model}"),
    log:
        "logs/{model}/backends_merge.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        code=code("tables", "figures"),
    script:
        "../../scripts/backends_merge.py"
