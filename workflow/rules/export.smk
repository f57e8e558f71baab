"""Checkpoints in formats that other software loads."""


rule export:
    input:
        checkpoint="results/{model}/checkpoint.json",
        inventory="results/{model}/inventory.parquet",
        folder="results/{model}/models/{plan}",
        plans_folder="results/{model}/plans",
        plans="results/{model}/plans.parquet",
        evaluate="results/{model}/evaluate.parquet",
        gates="results/{model}/gates.parquet",
    output:
        target=directory("results/{model}/{format}/{plan}"),
        table="results/{model}/{format}/{plan}.parquet",
    log:
        "logs/{model}/export/{format}/{plan}.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        settings=section("retrieve", "allocate", "export"),
        base=base,
        code=code("export", "budget", "report"),
    script:
        "../../scripts/export.py"


rule export_file:
    input:
        checkpoint="results/{model}/checkpoint.json",
        inventory="results/{model}/inventory.parquet",
        folder="results/{model}/models/{plan}",
        plans_folder="results/{model}/plans",
        plans="results/{model}/plans.parquet",
        evaluate="results/{model}/evaluate.parquet",
        gates="results/{model}/gates.parquet",
    output:
        target="results/{model}/{file_format}/{plan}.{file_format}",
        table="results/{model}/{file_format}/{plan}.parquet",
    log:
        "logs/{model}/export/{file_format}/{plan}.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        settings=section("retrieve", "allocate", "export"),
        base=base,
        code=code("export", "budget", "report"),
    script:
        "../../scripts/export.py"


rule export_merge:
    input:
        exports,
    output:
        "results/{model}/exports.parquet",
    log:
        "logs/{model}/export_merge.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        code=code("tables"),
    script:
        "../../scripts/export_merge.py"
