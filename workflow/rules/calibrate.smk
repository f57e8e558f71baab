"""Second moments of every site's input, block by block."""


rule calibrate:
    input:
        checkpoint="results/{model}/checkpoint.json",
        inventory="results/{model}/inventory.parquet",
        tokens="results/{model}/tokens.parquet",
    output:
        "results/{model}/moments.parquet",
    log:
        "logs/{model}/calibrate.log",
    cache: CACHE
    conda:
        "../../envs/bitalloc.yaml"
    threads: threads
    resources:
        gpu=gpu,
    params:
        settings=section("calibrate", "store", "device"),
        identity=identity,
        code=code("calibrate"),
    script:
        "../../scripts/calibrate.py"
