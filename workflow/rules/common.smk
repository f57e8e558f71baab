"""The configuration, checked once, and the few functions that every rule file uses."""

import functools
import os
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from bitalloc import config as configuration
from bitalloc.allocate import budget_slug
from bitalloc.errors import BitallocError
from bitalloc.families import family
from bitalloc.gates import read_verdict
from bitalloc.option import options
from bitalloc.provenance import source_digest
from bitalloc.store import Store, file_digest
from bitalloc.sweep import units

# the maths library takes fewer threads on a busy machine unless told not to, and then last digits differ
os.environ.setdefault("MKL_DYNAMIC", "FALSE")

PRODUCTS = ["goodhart.png", "report.md", "sensitivity.png", "errors.png", "law.png"]


def checked(function):
    """A fault in what the user wrote is one line, not a traceback."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except BitallocError as error:
            raise WorkflowError(str(error)) from None

    return call


CONFIG = checked(configuration.parse)(config)


wildcard_constraints:
    model=r"[^/]+",
    unit=r"[^/]+",
    gate=r"[a-z]+",
    plan=r"[^/]+",
    part=r"\d+",


@checked
@functools.cache
def settings(model):
    """The configuration of one model."""
    return CONFIG.for_model(model)


# a mistyped model on the command line is refused before the DAG is built, in one line
for target in map(Path, sys.argv[1:]):
    if target.parts[:1] == ("results",) and len(target.parts) > 2:
        settings(target.parts[1])


def section(*names):
    """Parameter function: the named sections of a model's configuration, as plain values."""
    return lambda wildcards: {name: settings(wildcards.model).model_dump(mode="json")[name] for name in names}


def sheet(wildcards):
    """Parameter function: the model's row of the model sheet, without its settings."""
    return checked(CONFIG.model)(wildcards.model).model_dump(exclude={"settings"})


def code(*modules):
    """Parameter: digest of the code behind a rule, so that a change of it makes the rule run again."""
    return source_digest(*(f"bitalloc.{module}" for module in modules))


# ---- Snakemake's cache between workflows
PLACE = os.environ.get("SNAKEMAKE_OUTPUT_CACHE", "")
CACHE = "omit-software" if PLACE else False  # without a place no rule is eligible, and Snakemake need not say so
if workflow.enable_cache and not (os.path.isabs(PLACE) and os.path.isdir(PLACE)):
    raise WorkflowError("--cache needs a folder to keep tables in: export SNAKEMAKE_OUTPUT_CACHE=/full/path/of/one")


@checked
def identity(wildcards, input):
    """Parameter function of a cached rule: what determines its output and is not in Snakemake's key otherwise.

    These are the wildcards, the content of inputs that other rules make (weights, in the end), and the store
    that the table points into. It follows from `input`, so it triggers no rerun.
    """
    if not (CACHE and workflow.enable_cache):
        return None
    store = Store(Path(settings(wildcards.model).store))
    contents = {name: file_digest(Path(path)) for name, path in input.items()}
    return {"wildcards": dict(wildcards.items()), "inputs": contents, "store": store.identity()}


def threads(wildcards):
    """Threads of a job that runs alone."""
    return settings(wildcards.model).threads


def threads_shared(wildcards):
    """Threads of one of several jobs that run side by side."""
    return max(1, settings(wildcards.model).threads // settings(wildcards.model).evaluate.jobs)


def gpu(wildcards):
    return int(settings(wildcards.model).device != "cpu")


# ---- what a model's configuration asks for
def expected_experiments(model):
    """Experiments of a complete sweep."""
    roles = family(CONFIG.model(model).family).roles
    return CONFIG.model(model).blocks * len(roles) * len(options(settings(model).sweep))


@checked
def sweep_units(wildcards):
    """Tables of all units of the sweep."""
    model = CONFIG.model(wildcards.model)
    names = units(family(model.family), model.blocks, settings(wildcards.model).sweep)
    return expand("results/{model}/sweep/{unit}.parquet", model=wildcards.model, unit=names)


@checked
def compressed_plans(wildcards):
    """Names of the plans that become checkpoints."""
    allocation, compress = settings(wildcards.model).allocate, settings(wildcards.model).compress
    return [f"{strategy}-{budget_slug(budget)}" for strategy in compress.plans for budget in allocation.budgets]


def evaluate_parts(pattern):
    """Input function: the pattern for every part of the evaluation."""
    return lambda wildcards: expand(pattern, model=wildcards.model, part=range(settings(wildcards.model).evaluate.jobs))


# ---- routing on the verdicts of gates
def gated(gate, then):
    """Input function: what `then` gives when `gate` says GO, its stop sign otherwise."""

    def inputs(wildcards):
        verdict = read_verdict(getattr(checkpoints, f"gate_{gate}").get(model=wildcards.model).output[0])
        return then(wildcards) if verdict["go"] else f"results/{wildcards.model}/gates/{gate}.NOGO"

    return inputs


def routed(gate, pattern):
    """Input function: the file of the branch that a gate with a fallback has chosen."""

    def inputs(wildcards):
        verdict = read_verdict(getattr(checkpoints, f"gate_{gate}").get(model=wildcards.model).output[0])
        return pattern.format(model=wildcards.model, route=verdict["route"])

    return gated(gate, inputs)


def passed(gate):
    """Input function: the verdict itself, once it says GO."""
    return gated(gate, lambda wildcards: f"results/{wildcards.model}/gates/{gate}.json")
