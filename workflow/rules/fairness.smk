"""Who pays for the bytes: parallel text in several languages, layers to protect, and plans for the worst-off of them."""


rule fairness_text:
    input:
        checkpoint="results/{model}/checkpoint.json",
    output:
        "results/{model}/fairness/text.parquet",
    log:
        "logs/{model}/fairness_text.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        settings=section("fairness", "seed"),
        code=code("languages"),
    script:
        "../../scripts/fairness_text.py"


rule fairness_sensitivity:
    input:
        checkpoint="results/{model}/checkpoint.json",
        inventory="results/{model}/inventory.parquet",
        moments="results/{model}/moments.parquet",
        sweep="results/{model}/sweep.parquet",
        text="results/{model}/fairness/text.parquet",
    output:
        "results/{model}/languages.parquet",
    log:
        "logs/{model}/fairness_sensitivity.log",
    conda:
        "../../envs/bitalloc.yaml"
    threads: threads
    resources:
        gpu=gpu,
    params:
        settings=section("fairness", "retrieve", "evaluate", "sensitivity", "sweep", "store", "device", "seed"),
        sheet=sheet,
        code=code("languages", "sensitivity"),
    script:
        "../../scripts/fairness_sensitivity.py"


use rule allocate as fairness_allocate with:
    input:
        costs=routed("fit", "results/{model}/costs.{route}.parquet"),
        sensitivity="results/{model}/sensitivity.parquet",
        inventory="results/{model}/inventory.parquet",
        embeddings=[],
        leaked=[],
        languages="results/{model}/languages.parquet",
        verdict=passed("fairness"),
        files=[],
        verdicts=expand("results/{{model}}/gates/{gate}.json", gate=["sweep", "fit", "fairness"]),
    output:
        plans="results/{model}/fairness/plans.parquet",
        folder=directory("results/{model}/fairness/plans"),
    log:
        "logs/{model}/fairness_allocate.log",
    params:
        settings=fairness_allocation,
        code=code("allocate"),


rule fairness_sweep:
    input:
        checkpoint="results/{model}/checkpoint.json",
        inventory="results/{model}/inventory.parquet",
        items_table="results/{model}/items.parquet",
        text="results/{model}/fairness/text.parquet",
    output:
        sentences="results/{model}/fairness/sentences.parquet",
        sets="results/{model}/fairness/sets.parquet",
        arms="results/{model}/fairness/arms.parquet",
        answers="results/{model}/fairness/answers.parquet",
    log:
        "logs/{model}/fairness_sweep.log",
    conda:
        "../../envs/bitalloc.yaml"
    threads: threads
    resources:
        gpu=gpu,
    params:
        settings=section("fairness", "retrieve", "evaluate", "store", "device", "seed"),
        sheet=sheet,
        code=code("languages", "quant_fairness"),
    script:
        "../../scripts/fairness_sweep.py"


rule fairness_evaluate:
    input:
        checkpoint="results/{model}/checkpoint.json",
        inventory="results/{model}/inventory.parquet",
        moments="results/{model}/moments.parquet",
        items_table="results/{model}/items.parquet",
        text="results/{model}/fairness/text.parquet",
        plans="results/{model}/fairness/plans.parquet",
        folder="results/{model}/fairness/plans",
    output:
        sentences="results/{model}/fairness/plans.sentences.parquet",
        arms="results/{model}/fairness/plans.arms.parquet",
        answers="results/{model}/fairness/plans.answers.parquet",
    log:
        "logs/{model}/fairness_evaluate.log",
    conda:
        "../../envs/bitalloc.yaml"
    threads: threads
    resources:
        gpu=gpu,
    params:
        settings=section("fairness", "retrieve", "evaluate", "sweep", "store", "device", "seed"),
        sheet=sheet,
        code=code("languages", "evaluate"),
    script:
        "../../scripts/fairness_evaluate.py"


rule fairness_backends:
    input:
        checkpoint="results/{model}/checkpoint.json",
        inventory="results/{model}/inventory.parquet",
        text="results/{model}/fairness/text.parquet",
        sets="results/{model}/fairness/sets.parquet",
        arms="results/{model}/fairness/arms.parquet",
    output:
        "results/{model}/fairness/backends.parquet",
    log:
        "logs/{model}/fairness_backends.log",
    conda:
        "../../envs/bitalloc.yaml"
    threads: threads
    resources:
        gpu=gpu,
    params:
        settings=section("evaluate", "store", "device", "seed"),
        sheet=sheet,
        code=code("languages", "backends", "compress"),
    script:
        "../../scripts/fairness_backends.py"


rule fairness:
    input:
        sentences="results/{model}/fairness/sentences.parquet",
        sets="results/{model}/fairness/sets.parquet",
        arms="results/{model}/fairness/arms.parquet",
        answers="results/{model}/fairness/answers.parquet",
        plans="results/{model}/fairness/plans.parquet",
        plan_sentences="results/{model}/fairness/plans.sentences.parquet",
        plan_arms="results/{model}/fairness/plans.arms.parquet",
        plan_answers="results/{model}/fairness/plans.answers.parquet",
        backends="results/{model}/fairness/backends.parquet",
    output:
        table="results/{model}/fairness.parquet",
        protected="results/{model}/fairness/protected.parquet",
        synergy="results/{model}/fairness/synergy.parquet",
        criteria="results/{model}/fairness/criteria.parquet",
        figure=report("results/{model}/fairness.png", caption="../report/fairness.rst", category="fairness"),
        allocation=report(
            "results/{model}/fairness_plans.png", caption="../report/fairness_plans.rst", category="fairness"
        ),
    log:
        "logs/{model}/fairness.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        settings=section("fairness", "seed"),
        code=code("fairness", "figures"),
    script:
        "../../scripts/fairness.py"
