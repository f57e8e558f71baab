"""The precision of every component by evolution on real text; stands on no calibration and no sweep."""


rule evolve:
    input:
        checkpoint="results/{model}/checkpoint.json",
        inventory="results/{model}/inventory.parquet",
        tokens="results/{model}/tokens.parquet",
    output:
        table="results/{model}/evolution.parquet",
        plan="results/{model}/evolved.json",
        figure=report("results/{model}/evolution.png", caption="../report/evolution.rst", category="{model}"),
    log:
        "logs/{model}/evolve.log",
    conda:
        "../../envs/bitalloc.yaml"
    threads: threads
    resources:
        gpu=gpu,
    params:
        settings=section("evolve", "evaluate", "store", "device", "seed"),
        code=code("evolve", "figures"),
    script:
        "../../scripts/evolve.py"
