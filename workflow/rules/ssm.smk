"""State spaces: what schemes of weights and activations do to long contexts and to the recurrent state."""


rule passkey:
    input:
        checkpoint="results/{model}/checkpoint.json",
        inventory="results/{model}/inventory.parquet",
        tokens="results/{model}/tokens.parquet",
    output:
        "results/{model}/passkey.parquet",
    log:
        "logs/{model}/passkey.log",
    conda:
        "../../envs/bitalloc.yaml"
    threads: threads
    resources:
        gpu=gpu,
    params:
        settings=section("passkey", "schemes", "evaluate", "store", "device", "seed"),
        sheet=sheet,
        code=code("passkey", "schemes.ladder"),
    script:
        "../../scripts/passkey.py"


rule drift:
    input:
        checkpoint="results/{model}/checkpoint.json",
        inventory="results/{model}/inventory.parquet",
        tokens="results/{model}/tokens.parquet",
    output:
        "results/{model}/drift.parquet",
    log:
        "logs/{model}/drift.log",
    conda:
        "../../envs/bitalloc.yaml"
    threads: threads
    resources:
        gpu=gpu,
    params:
        settings=section("drift", "schemes", "evaluate", "store", "device", "seed"),
        sheet=sheet,
        code=code("drift", "schemes.ladder"),
    script:
        "../../scripts/drift.py"


rule failure_modes:
    input:
        schemes="results/{model}/schemes.parquet",
        passkey="results/{model}/passkey.parquet",
        drift="results/{model}/drift.parquet",
        layerwise="results/{model}/layerwise.parquet",
    output:
        report("results/{model}/failure_modes.png", caption="../report/failure_modes.rst", category="{model}"),
    log:
        "logs/{model}/failure_modes.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        scheme=lambda wildcards: settings(wildcards.model).schemes.layerwise[0],
        code=code("figures"),
    script:
        "../../scripts/failure_modes.py"
