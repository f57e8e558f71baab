"""The error of every matrix at every option, and what an error costs in KL."""


rule sweep:
    input:
        checkpoint="results/{model}/checkpoint.json",
        inventory="results/{model}/inventory.parquet",
        moments="results/{model}/moments.parquet",
    output:
        "results/{model}/sweep/{unit}.parquet",
    log:
        "logs/{model}/sweep/{unit}.log",
    cache: CACHE
    conda:
        "../../envs/bitalloc.yaml"
    threads: threads_shared
    resources:
        gpu=gpu,
    params:
        settings=section("sweep", "store", "device"),
        identity=identity,
        code=code("sweep"),
    script:
        "../../scripts/sweep.py"


rule sweep_assemble:
    input:
        units=sweep_units,
        inventory="results/{model}/inventory.parquet",
    output:
        "results/{model}/sweep.parquet",
    log:
        "logs/{model}/sweep_assemble.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        family=lambda wildcards: CONFIG.model(wildcards.model).family,
        settings=section("sweep"),
        code=code("sweep"),
    script:
        "../../scripts/sweep_assemble.py"


rule sweep_sensitivity:
    input:
        checkpoint="results/{model}/checkpoint.json",
        inventory="results/{model}/inventory.parquet",
        tokens="results/{model}/tokens.parquet",
        moments="results/{model}/moments.parquet",
        sweep="results/{model}/sweep.parquet",
    output:
        "results/{model}/sensitivity.parquet",
    log:
        "logs/{model}/sweep_sensitivity.log",
    conda:
        "../../envs/bitalloc.yaml"
    threads: threads
    resources:
        gpu=gpu,
    params:
        settings=section("sensitivity", "sweep", "store", "device", "seed"),
        split="calibrate",
        code=code("sensitivity"),
    script:
        "../../scripts/sweep_sensitivity.py"


rule sweep_leaked:
    input:
        checkpoint="results/{model}/checkpoint.json",
        inventory="results/{model}/inventory.parquet",
        tokens="results/{model}/tokens.parquet",
        moments="results/{model}/moments.parquet",
        sweep="results/{model}/sweep.parquet",
    output:
        "results/{model}/leaked/sensitivity.parquet",
    log:
        "logs/{model}/sweep_leaked.log",
    conda:
        "../../envs/bitalloc.yaml"
    threads: threads
    resources:
        gpu=gpu,
    params:
        settings=section("sensitivity", "sweep", "store", "device", "seed"),
        split="report",
        code=code("sensitivity"),
    script:
        "../../scripts/sweep_sensitivity.py"


rule sweep_embeddings:
    input:
        checkpoint="results/{model}/checkpoint.json",
        inventory="results/{model}/inventory.parquet",
        tokens="results/{model}/tokens.parquet",
    output:
        "results/{model}/embeddings.parquet",
    log:
        "logs/{model}/sweep_embeddings.log",
    conda:
        "../../envs/bitalloc.yaml"
    threads: threads
    resources:
        gpu=gpu,
    params:
        settings=section("sensitivity", "sweep", "store", "device", "seed"),
        code=code("embeddings"),
    script:
        "../../scripts/sweep_embeddings.py"
