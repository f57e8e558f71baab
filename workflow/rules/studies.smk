"""Studies (config/studies/*.yaml): the same plans by position in several models, and the verdicts on what was claimed."""


rule train_gpt2:
    input:
        tokenizer="resources/tiny/tokenizer.json",
    output:
        "results/trained/gpt2-{blocks}/model.safetensors",
    log:
        "logs/trained/gpt2-{blocks}.log",
    wildcard_constraints:
        blocks=r"[1-9]\d*",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        store=CONFIG.store,
        code=code("train"),
    script:
        "../../scripts/train_gpt2.py"


use rule retrieve_corpora as study_corpora with:
    output:
        tokens="results/studies/{study}/{model}/tokens.parquet",
        items_table="results/studies/{study}/{model}/items.parquet",
    log:
        "logs/studies/{study}/{model}/retrieve_corpora.log",
    params:
        settings=study_section("retrieve", "corpora", "seed"),
        code=code("retrieve", "corpus"),


rule study_evaluate:
    input:
        checkpoint="results/{model}/checkpoint.json",
        inventory="results/{model}/inventory.parquet",
        tokens="results/studies/{study}/{model}/tokens.parquet",
    output:
        scores="results/studies/{study}/{model}/evaluate.parquet",
        responses="results/studies/{study}/{model}/responses.parquet",
        folder=directory("results/studies/{study}/{model}/plans"),
    log:
        "logs/studies/{study}/{model}/evaluate.log",
    conda:
        "../../envs/bitalloc.yaml"
    threads: threads
    resources:
        gpu=gpu,
    params:
        study=lambda wildcards: study(wildcards).model_dump(mode="json"),
        settings=study_section("evaluate", "sweep", "store", "device", "seed"),
        sheet=sheet,
        code=code("evaluate", "strategies.position"),
    script:
        "../../scripts/position_evaluate.py"


rule study_backends:
    input:
        checkpoint="results/{model}/checkpoint.json",
        inventory="results/{model}/inventory.parquet",
        tokens="results/studies/{study}/{model}/tokens.parquet",
        folder="results/studies/{study}/{model}/plans",
    output:
        "results/studies/{study}/{model}/backends.parquet",
    log:
        "logs/studies/{study}/{model}/backends.log",
    conda:
        "../../envs/bitalloc.yaml"
    threads: threads
    resources:
        gpu=gpu,
    params:
        rules=study_runs,
        settings=study_section("evaluate", "sweep", "store", "device", "seed"),
        sheet=sheet,
        code=code("backends", "compress"),
    script:
        "../../scripts/position_backends.py"


rule study:
    input:
        responses=study_models("results/studies/{study}/{model}/responses.parquet"),
        inventories=study_models("results/{model}/inventory.parquet"),
        folders=study_models("results/studies/{study}/{model}/plans"),
        backends=study_models("results/studies/{study}/{model}/backends.parquet"),
    output:
        table="results/studies/{study}/position.parquet",
        criteria="results/studies/{study}/criteria.parquet",
        figure=report("results/studies/{study}/position.png", caption="../report/position.rst", category="studies"),
    log:
        "logs/studies/{study}/position.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        study=lambda wildcards: study(wildcards).model_dump(mode="json"),
        sheets=lambda wildcards: {
            name: CONFIG.model(name).model_dump(exclude={"settings"}) for name in study_run(wildcards)
        },
        skipped=lambda wildcards: {name: why for name, why in CONFIG.skip.items() if name in study(wildcards).models},
        resamples=CONFIG.evaluate.resamples,
        seed=CONFIG.seed,
        code=code("position", "precision", "figures"),
    script:
        "../../scripts/position.py"
