"""Nothing -> a GPT-2 of so many blocks, trained on the synthetic world within minutes; the store keeps its weights."""

from pathlib import Path

from bitalloc import train
from bitalloc.script import stage
from bitalloc.store import Store

if __name__ == "__main__":
    with stage(snakemake) as job:
        train.train_gpt2(
            job.output.parent,
            blocks=int(snakemake.wildcards.blocks),
            tokenizer=job.inputs["tokenizer"].parent,
            store=Store(Path(snakemake.params.store)),
        )
