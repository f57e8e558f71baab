"""Plots of a run from its records alone: python scripts/make_plots.py --run-dir runs/ID"""

import sys

from bitalloc.profile.plots import command

if __name__ == "__main__":
    sys.exit(command(__doc__))
