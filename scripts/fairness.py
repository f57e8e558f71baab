"""Sentences under sets and plans -> fairness.parquet [tables.FAIRNESS], protected, synergy, and the figure."""

from pathlib import Path

import pandas as pd

from bitalloc import fairness, figures
from bitalloc.config import Config
from bitalloc.script import stage
from bitalloc.tables import ANSWERS, ARMS, FAIRNESS, PLANS, PROTECTED, SENTENCES, SETS, SYNERGY, read_verdicts
