"""GO/NO-GO: a checkpoint records a verdict, an input function routes on it, a NO-GO leads to a stop sign."""

from bitalloc.gates import read_verdict


def gated(gate, then):
    """Input function: what `then` gives when `gate` says GO, its stop sign otherwise."""

    def inputs(wildcards):
        verdict = read_verdict(getattr(checkpoints, f"gate_{gate}").get(model=wildcards.model).output[0])
        return then(wildcards) if verdict["go"] else f"results/{wildcards.model}/gates/{gate}.NOGO"

    return inputs


def routed(gate, pattern):
    """Input function: the file of the branch that a gate with a fallback has chosen."""

    def inputs(wildcards):
        verdict = read_verdict(getattr(checkpoints, f"gate_{gate}").get(model=wildcards.model).output[0])
        return pattern.format(model=wildcards.model, route=verdict["route"])

    return gated(gate, inputs)


def passed(gate):
    """Input function: the verdict itself, once it says GO."""
    return gated(gate, lambda wildcards: f"results/{wildcards.model}/gates/{gate}.json")


checkpoint gate_sweep:
    input:
        sweep="results/{model}/sweep.parquet",
        sensitivity="results/{model}/sensitivity.parquet",
    output:
        "results/{model}/gates/sweep.json",
    log:
        "logs/{model}/gate_sweep.log",
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
        items_table="results/{model}/items.parquet",
    output:
        "results/{model}/gates/downstream.json",
    log:
        "logs/{model}/gate_downstream.log",
    params:
        gate="downstream",
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
    script:
        "../../scripts/stop_sign.py"
