"""Speed and memory of the model at each precision: prefill and decode, against length and batch."""


rule profile:
    input:
        checkpoint="results/{model}/checkpoint.json",
        inventory="results/{model}/inventory.parquet",
        models=profiled,
        tokens=calibrating,
    output:
        table="results/{model}/profile.parquet",
        figure=report("results/{model}/profile.png", caption="../report/profile.rst", category="{model}"),
    log:
        "logs/{model}/profile.log",
    conda:
        "../../envs/bitalloc.yaml"
    threads: threads
    resources:
        gpu=gpu,
    params:
        settings=section("profile", "schemes", "device", "seed", "threads"),
        sheet=sheet,
        code=code("profile.bench", "figures"),
    script:
        "../../scripts/profile_model.py"
