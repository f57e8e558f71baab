"""Model and corpora -> inventory, token windows, items."""


rule retrieve_model:
    input:
        trained,
    output:
        checkpoint="results/{model}/checkpoint.json",
        inventory="results/{model}/inventory.parquet",
    log:
        "logs/{model}/retrieve_model.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        sheet=sheet,
        code=code("retrieve"),
    script:
        "../../scripts/retrieve_model.py"


rule retrieve_corpora:
    input:
        checkpoint="results/{model}/checkpoint.json",
    output:
        tokens="results/{model}/tokens.parquet",
        items_table="results/{model}/items.parquet",
    log:
        "logs/{model}/retrieve_corpora.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        settings=section("retrieve", "corpora", "seed"),
        code=code("retrieve", "corpus"),
    script:
        "../../scripts/retrieve_corpora.py"


rule retrieve_readings:
    input:
        checkpoint="results/{model}/checkpoint.json",
    output:
        "results/{model}/readings.parquet",
    log:
        "logs/{model}/retrieve_readings.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        settings=section("retrieve", "evaluate", "corpora", "seed"),
        code=code("protocols"),
    script:
        "../../scripts/retrieve_readings.py"


rule train_tiny:
    output:
        "resources/tiny/model.safetensors",
    log:
        "logs/tiny/train.log",
    conda:
        "../../envs/bitalloc.yaml"
    threads: 2
    script:
        "../../scripts/train_tiny.py"


rule train_mamba2:
    input:
        tokenizer=ancient("resources/tiny/tokenizer.json"),
    output:
        "resources/tiny_mamba2/model.safetensors",
    log:
        "logs/tiny_mamba2/train.log",
    conda:
        "../../envs/bitalloc.yaml"
    script:
        "../../scripts/train_mamba2.py"
