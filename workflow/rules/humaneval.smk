"""HumanEval in two steps: what a plan writes, and, only where the configuration says so, what becomes of it."""


rule humaneval_generate:
    input:
        checkpoint="results/{model}/checkpoint.json",
        inventory="results/{model}/inventory.parquet",
        plan=written,
    output:
        "results/{model}/humaneval/{plan}.samples.parquet",
    log:
        "logs/{model}/humaneval/{plan}.samples.log",
    conda:
        "../../envs/bitalloc.yaml"
    threads: threads
    resources:
        gpu=gpu,
    params:
        settings=generation,
        code=code("humaneval"),
    script:
        "../../scripts/humaneval_generate.py"


rule humaneval_execute:
    input:
        permitted,
    output:
        "results/{model}/humaneval/{plan}.parquet",
    log:
        "logs/{model}/humaneval/{plan}.log",
    wildcard_constraints:
        plan=r"[^/]+(?<!\.samples)",
    conda:
        "../../envs/bitalloc.yaml"
    threads: threads
    params:
        settings=section("humaneval"),
        code=code("execute"),
    script:
        "../../scripts/humaneval_execute.py"


rule humaneval_merge:
    input:
        executions,
    output:
        "results/{model}/humaneval.parquet",
    log:
        "logs/{model}/humaneval_merge.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        settings=section("humaneval"),
        code=code("execute", "tables"),
    script:
        "../../scripts/humaneval_merge.py"
