"""The tokenizer of tiny -> resources/tiny_mamba2: train the embedded state space; its weights are committed."""

from pathlib import Path

from bitalloc import train
from bitalloc.script import stage

if __name__ == "__main__":
    with stage(snakemake):
        train.train_mamba2(
            Path(snakemake.output[0]).parent,
            tokenizer=Path(snakemake.input.tokenizer).parent,
        )
