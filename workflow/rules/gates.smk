"""GO/NO-GO: a checkpoint records a verdict, an input function routes on it, a NO-GO leads to a stop sign."""


checkpoint gate_sweep:
    input:
        sweep="results/{model}/sweep.parquet",
        sensitivity="results/{model}/sensitivity.parquet",
    output:
        "results/{model}/gates/sweep.json",
    log:
        "logs/{model}/gate_sweep.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        gate="sweep",
        settings=section("gates", "sensitivity"),
        expected=lambda wildcards: expected_experiments(wildcards.model),
        code=code("gates"),
    script:
        "../../scripts/gate.py"


checkpoint gate_fit:
    input:
        law="results/{model}/law.parquet",
    output:
        "results/{model}/gates/fit.json",
    log:
        "logs/{model}/gate_fit.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        gate="fit",
        settings=section("gates", "fit"),
        code=code("gates"),
    script:
        "../../scripts/gate.py"


checkpoint gate_allocate:
    input:
        plans="results/{model}/candidates.parquet",
    output:
        "results/{model}/gates/allocate.json",
    log:
        "logs/{model}/gate_allocate.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        gate="allocate",
        settings=section("gates"),
        code=code("gates"),
    script:
        "../../scripts/gate.py"


checkpoint gate_pilot:
    input:
        plans="results/{model}/candidates.parquet",
        evaluate="results/{model}/select.parquet",
    output:
        "results/{model}/gates/pilot.json",
    log:
        "logs/{model}/gate_pilot.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        gate="pilot",
        settings=section("gates"),
        code=code("gates"),
    script:
        "../../scripts/gate.py"


checkpoint gate_compress:
    input:
        checkpoints="results/{model}/checkpoints.parquet",
    output:
        "results/{model}/gates/compress.json",
    log:
        "logs/{model}/gate_compress.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        gate="compress",
        settings=section("gates"),
        code=code("gates"),
    script:
        "../../scripts/gate.py"


checkpoint gate_downstream:
    input:
        plans="results/{model}/plans.parquet",
        evaluate="results/{model}/evaluate.parquet",
    output:
        "results/{model}/gates/downstream.json",
    log:
        "logs/{model}/gate_downstream.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        gate="downstream",
        settings=section("gates"),
        code=code("gates"),
    script:
        "../../scripts/gate.py"


checkpoint gate_fairness:
    input:
        languages="results/{model}/languages.parquet",
    output:
        "results/{model}/gates/fairness.json",
    log:
        "logs/{model}/gate_fairness.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        gate="fairness",
        settings=section("gates"),
        code=code("gates"),
    script:
        "../../scripts/gate.py"


rule gates:
    input:
        expand(
            "results/{{model}}/gates/{gate}.json", gate=["sweep", "fit", "allocate", "pilot", "compress", "downstream"]
        ),
    output:
        "results/{model}/gates.parquet",
    log:
        "logs/{model}/gates.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        code=code("gates", "tables"),
    script:
        "../../scripts/gates.py"


rule stop_sign:
    input:
        "results/{model}/gates/{gate}.json",
    output:
        "results/{model}/gates/{gate}.NOGO",
    log:
        "logs/{model}/stop_{gate}.log",
    conda:
        "../../envs/bitalloc.yaml"
    script:
        "../../scripts/stop_sign.py"
