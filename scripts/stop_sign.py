"""A NO-GO verdict -> exit status 1, with criterion, value, threshold, evidence and how to go on."""

import sys
from pathlib import Path

import pandas as pd

from bitalloc.gates import message, read_verdict
from bitalloc.script import stage


def main(*, path_to_verdict: Path) -> str:
    return message(pd.DataFrame(read_verdict(path_to_verdict)["checks"]))


if __name__ == "__main__":
    with stage(snakemake):
        print(main(path_to_verdict=Path(snakemake.input[0])), file=sys.stderr, flush=True)
        sys.exit(1)
