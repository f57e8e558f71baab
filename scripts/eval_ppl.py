"""Perplexity of a model at some precisions, by hand: python scripts/eval_ppl.py --config config/runs/tiny.yaml"""

import sys

from bitalloc.profile.run import command, perplexity

if __name__ == "__main__":
    sys.exit(command(perplexity, __doc__))
