"""Nothing -> resources/tiny: train the embedded model (ten minutes on 3 cores); its weights are committed."""

from pathlib import Path

from bitalloc import train
from bitalloc.script import stage


def main(*, path_to_model: Path) -> None:
    train.train(path_to_model)


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(path_to_model=job.output.parent)
