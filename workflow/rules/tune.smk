"""Learned rounding: the codes of a plan, block by block and through the whole model; bytes stay."""


rule tune:
    input:
        pilot=passed("pilot"),
        checkpoint="results/{model}/checkpoint.json",
        inventory="results/{model}/inventory.parquet",
        moments="results/{model}/moments.parquet",
        embeddings=embeddings,
        tokens="results/{model}/tokens.parquet",
        plans="results/{model}/plans.parquet",
        folder="results/{model}/plans",
    output:
        "results/{model}/tune/{plan}.parquet",
    log:
        "logs/{model}/tune/{plan}.log",
    conda:
        "../../envs/bitalloc.yaml"
    threads: threads
    resources:
        gpu=gpu,
    params:
        settings=section("tune", "sweep", "store", "device", "seed"),
        code=code("tune"),
    script:
        "../../scripts/tune.py"


rule tune_merge:
    input:
        tuned_parts,
    output:
        "results/{model}/tune.parquet",
    log:
        "logs/{model}/tune_merge.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        code=code("tables"),
    script:
        "../../scripts/tune_merge.py"


rule tune_options:
    input:
        verdict=passed("sweep"),
        checkpoint="results/{model}/checkpoint.json",
        inventory="results/{model}/inventory.parquet",
        moments="results/{model}/moments.parquet",
        tokens="results/{model}/tokens.parquet",
        sweep="results/{model}/sweep.parquet",
    output:
        table="results/{model}/tune_options.parquet",
        figure=report("results/{model}/tune.png", caption="../report/tune.rst", category="{model}"),
    log:
        "logs/{model}/tune_options.log",
    conda:
        "../../envs/bitalloc.yaml"
    threads: threads
    resources:
        gpu=gpu,
    params:
        settings=section("tune", "sweep", "store", "device", "seed"),
        code=code("tune", "figures"),
    script:
        "../../scripts/tune_options.py"
