"""Plans made real: packed checkpoints of the promised size."""


rule compress:
    input:
        pilot=passed("pilot"),
        checkpoint="results/{model}/checkpoint.json",
        inventory="results/{model}/inventory.parquet",
        moments="results/{model}/moments.parquet",
        embeddings=embeddings,
        plans="results/{model}/plans.parquet",
        folder="results/{model}/plans",
        tuned=tuned,
    output:
        folder=directory("results/{model}/models/{plan}"),
        table="results/{model}/models/{plan}.parquet",
    log:
        "logs/{model}/compress/{plan}.log",
    conda:
        "../../envs/bitalloc.yaml"
    threads: threads_shared
    resources:
        gpu=gpu,
    params:
        settings=section("sweep", "store", "device"),
        code=code("compress", "tune"),
    script:
        "../../scripts/compress.py"


rule compress_merge:
    input:
        lambda wildcards: expand(
            "results/{model}/models/{plan}.parquet", model=wildcards.model, plan=compressed_plans(wildcards)
        ),
    output:
        "results/{model}/checkpoints.parquet",
    log:
        "logs/{model}/compress_merge.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        code=code("tables"),
    script:
        "../../scripts/compress_merge.py"
