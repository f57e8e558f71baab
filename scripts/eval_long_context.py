"""Passkeys at lengths x depths, by hand: python scripts/eval_long_context.py --config config/runs/tiny.yaml"""

import sys

from bitalloc.profile.run import command, long_context

if __name__ == "__main__":
    sys.exit(command(long_context, __doc__))
