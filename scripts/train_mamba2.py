"""The tokenizer of tiny -> resources/tiny_mamba2: train the embedded state space; its weights are committed."""

from bitalloc import train
from bitalloc.script import stage

if __name__ == "__main__":
    with stage(snakemake) as job:
        train.train_mamba2(
            job.output.parent,
            tokenizer=job.inputs["tokenizer"].parent,
        )
