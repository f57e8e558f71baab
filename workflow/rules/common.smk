"""The configuration, checked once, and the few functions that every rule file uses."""

import functools
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import get_args
from uuid import uuid4

from snakemake.exceptions import WorkflowError
from snakemake_interface_executor_plugins.settings import ExecMode

from bitalloc import config as configuration
from bitalloc import provenance
from bitalloc.config import SPOKEN, budget_slug, tuned_from
from bitalloc.errors import BitallocError, nearest
from bitalloc.execute import REFERENCE, permit
from bitalloc.families import family
from bitalloc.gates import read_verdict
from bitalloc.option import options
from bitalloc.scheme import Scheme
from bitalloc.store import Store, write_atomically
from bitalloc.sweep import units

# the maths library takes fewer threads on a busy machine unless told not to, and then last digits differ
os.environ.setdefault("MKL_DYNAMIC", "FALSE")

# the pages stand on the figures and tables of all other stages
PRODUCTS = ["goodhart.png", "report.md", "report.html", "paper/main.tex"]


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

# ---- faults that Snakemake meets with a traceback, or does not see
for place in (".", "results", "logs", ".snakemake"):
    if os.path.exists(place) and not os.access(place, os.W_OK):
        raise WorkflowError(f"cannot write {os.path.abspath(place)}; fix permissions or mount it writable, then rerun")
if shutil.disk_usage(".").free < 2**20:
    raise WorkflowError(f"the disk of {os.getcwd()} is full; free space, then rerun")
# jobs on other machines: what the head wrote must be there, not in another folder under the same path
BEACON = Path(".snakemake/beacon")
if workflow.remote_exec and (
    not BEACON.exists() or os.environ.get("BITALLOC_BEACON", BEACON.read_text()) != BEACON.read_text()
):
    raise WorkflowError(
        f"on {platform.node()}, {os.getcwd()} is not the folder in which the run was started: all machines must mount "
        "one file system at the same path"
    )
# a table of tomorrow looks newer than what it is made from, whatever that is
MADE = [
    path for pattern in ("*/*.parquet", "*/*/*.parquet", "*/gates/*.json") for path in Path("results").glob(pattern)
]
if AHEAD := [str(path) for path in MADE if path.lstat().st_mtime > time.time() + 60]:
    raise WorkflowError(
        f"{AHEAD[0]} and {len(AHEAD) - 1} others are from the future: the clock has gone back. Set it right, or delete "
        "them and rerun (the work is in the store): find results -newermt now ! -path '*/store/*' ! -type d -delete"
    )


# One GPU job at a time on this machine, unless `--resources gpu=2` says that it has more cards. Not in a profile: a limit
# there would hold on clusters too, and cut a job that asks for two GPUs down to one.
if (
    workflow.exec_mode == ExecMode.DEFAULT
    and workflow.global_resources["_nodes"].value is None
    and "gpu" not in workflow.global_resources
):
    workflow.register_resource("gpu", 1)


onstart:
    if not BEACON.exists():
        write_atomically(BEACON.absolute(), uuid4().hex.encode())
    # Slurm hands it on to its jobs; those of Lepton look for a file of their own
    os.environ.update(BITALLOC_BEACON=BEACON.read_text())


# seconds each: the head does them while a cluster would still be looking for a place
localrules:
    gate_sweep,
    gate_fit,
    gate_allocate,
    gate_pilot,
    gate_compress,
    gate_downstream,
    gate_fairness,
    gates,
    stop_sign,
    sweep_assemble,
    allocate_best,
    tune_merge,
    compress_merge,
    evaluate_merge,
    humaneval_merge,
    export_merge,
    backends_merge,
    report,
    report_figures,
    report_domains,


wildcard_constraints:
    model=r"[^/]+",
    unit=r"[^/]+",
    gate=r"[a-z]+",
    plan=r"[^/]+",
    part=r"\d+",
    format="huggingface|gptq",
    file_format="gguf",


@checked
@functools.cache
def settings(model):
    """The configuration of one model."""
    return CONFIG.for_model(model)


@functools.cache
def studies():
    """Every study of config/studies, by its name."""
    return {path.stem: configuration.read_study(path, CONFIG) for path in sorted(Path("config/studies").glob("*.yaml"))}


@checked
def named_study(name):
    """A study; raises for an unknown one."""
    if name not in studies():
        raise BitallocError(f"unknown study {name!r}: {nearest(name, studies())}")
    return studies()[name]


@checked
def own_plans(model):
    """Precision maps of the user's own; raises for one that does not exist."""
    for file in (files := settings(model).allocate.plans):
        if not os.path.exists(file):
            raise BitallocError(
                f"allocate.plans: {file} does not exist; give a .json or .yaml file with a precision map"
            )
    return files


# a mistyped name on the command line, or in what it asks for, is refused before the DAG is built, in one line
for target in map(Path, sys.argv[1:]):
    if target.parts[:1] == ("results",) and len(target.parts) > 2 and target.parts[1] != "trained":
        (named_study(target.parts[2]) if target.parts[1] == "studies" else own_plans(target.parts[1]))


def section(*names):
    """Parameter function: the named sections of a model's configuration, as plain values."""
    return lambda wildcards: {name: settings(wildcards.model).model_dump(mode="json")[name] for name in names}


def sheet(wildcards):
    """Parameter function: the model's row of the model sheet, without its settings."""
    return checked(CONFIG.model)(wildcards.model).model_dump(exclude={"settings"})


def trained(wildcards):
    """Input function: the weights of a model that the workflow trains itself."""
    path = sheet(wildcards)["path"] or ""
    return f"{path}/model.safetensors" if path.startswith(("resources/", "results/trained/")) else []


def base(wildcards):
    """Parameter function: the model's name on the hub, if it has one."""
    return sheet(wildcards)["hub"]


def code(*modules):
    """Parameter: digest of the code behind a rule, so that a change of it makes the rule run again."""
    return provenance.source_digest(*(f"bitalloc.{module}" for module in modules))


# ---- Snakemake's cache between workflows
PLACE = os.environ.get("SNAKEMAKE_OUTPUT_CACHE", "")
CACHE = "omit-software" if PLACE else False  # without a place no rule is eligible, and Snakemake need not say so
if workflow.enable_cache and not (os.path.isabs(PLACE) and os.path.isdir(PLACE)):
    raise WorkflowError("--cache needs a folder to keep tables in: export SNAKEMAKE_OUTPUT_CACHE=/full/path/of/one")


@checked
def identity(wildcards, input):
    """Parameter function of a cached rule: what its key lacks otherwise. It follows from `input`: no rerun trigger."""
    if CACHE and workflow.enable_cache:
        inputs = {name: Path(path) for name, path in input.items()}
        return provenance.identity(dict(wildcards.items()), inputs, Store(Path(settings(wildcards.model).store)))


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


def tuned(wildcards):
    """Input function: what was learned, of a plan that is tuned."""
    strategies = [name for name in settings(wildcards.model).compress.plans if tuned_from(name)]
    if any(wildcards.plan.startswith(f"{name}-") for name in strategies):
        return f"results/{wildcards.model}/tune/{wildcards.plan}.parquet"
    return []


@checked
def tuned_parts(wildcards):
    """Tables of the plans whose codes are learned."""
    allocation, compress = settings(wildcards.model).allocate, settings(wildcards.model).compress
    strategies = [name for name in compress.plans if tuned_from(name)]
    if not strategies:
        raise BitallocError(f"{wildcards.model} tunes no plan; add `tuned` to compress.plans")
    names = [f"{strategy}-{budget_slug(budget)}" for strategy in strategies for budget in allocation.budgets]
    return expand("results/{model}/tune/{plan}.parquet", model=wildcards.model, plan=names)


def embeddings(wildcards):
    """Input function: what embedding and head cost, where the sweep offers them fewer than 16 bits."""
    offered = settings(wildcards.model).sweep.embedding_bits
    return [] if offered == [16] else f"results/{wildcards.model}/embeddings.parquet"


def leaked(name):
    """Input function: a table of the arm of that name, where the configuration has it."""

    def inputs(wildcards):
        return f"results/{wildcards.model}/leaked/{name}" if "leaked" in settings(wildcards.model).allocate.arms else []

    return checked(inputs)


def languages(wildcards):
    """Input function: what every matrix costs each language, where a strategy asks for it."""
    asked = set(settings(wildcards.model).allocate.strategies) & set(SPOKEN)
    return f"results/{wildcards.model}/languages.parquet" if asked else []


def fairness_allocation(wildcards):
    """Parameter function: the sections of `allocate`, with the plans that are compared by language and no others."""
    whole = section("allocate", "export", "sensitivity", "sweep", "fairness", "seed")(wildcards)
    strategies = ["uniform", "optimal", *SPOKEN]
    plans = {
        "strategies": strategies,
        "runners_up": 0,
        "pool": whole["fairness"]["seeds"],
        "arms": [],
        "rules": [],
        "plans": [],
    }
    return whole | {"allocate": whole["allocate"] | plans}


@checked
def exports(wildcards):
    """Tables of the checkpoints in the formats that the configuration names."""
    formats = settings(wildcards.model).export.formats
    if not formats:
        raise BitallocError(
            f"{wildcards.model} is exported in no format; set export.formats, [huggingface] for example"
        )
    names = compressed_plans(wildcards)
    return expand("results/{model}/{format}/{plan}.parquet", model=wildcards.model, format=formats, plan=names)


@checked
def backends_parts(wildcards):
    """Tables of every plan in every backend that the configuration names."""
    asked, allocation = settings(wildcards.model).backends, settings(wildcards.model).allocate
    slugs = [budget_slug(budget) for budget in allocation.budgets]
    named = dict.fromkeys(["best", *allocation.strategies, *settings(wildcards.model).compress.plans])
    plans = [f"{strategy}-{slug}" for strategy in named for slug in slugs]
    for what, given, known in (("plan", asked.plans, plans), ("backend", asked.names, type(asked)().names)):
        for name in given:
            if name not in known:
                raise BitallocError(f"unknown {what} {name!r} in the section backends: {nearest(name, known)}")
    pattern = "results/{model}/backends/{plan}/{backend}.parquet"
    return expand(pattern, model=wildcards.model, plan=asked.plans or plans[:1], backend=asked.names)


@checked
def profiled(wildcards):
    """Input function: checkpoints of the pipeline that are profiled; plans by rule are made on the spot."""
    named = [name for name in settings(wildcards.model).profile.variants if name != REFERENCE]
    plans = dict.fromkeys(name.partition(":")[0] for name in named if ":" in name)
    known = [*compressed_plans(wildcards), *get_args(configuration.Rule)]
    for plan in plans:
        if plan not in known:
            raise BitallocError(f"unknown plan {plan!r} in profile.variants: {nearest(plan, [REFERENCE, *known])}")
    return [f"results/{wildcards.model}/models/{plan}" for plan in plans if plan not in get_args(configuration.Rule)]


@checked
def calibrating(wildcards):
    """Input function: text for profiled schemes that are calibrated."""
    named = [name for name in settings(wildcards.model).profile.variants if name != REFERENCE and ":" not in name]
    needed = [name for name in named if Scheme.parse(name).calibrated]
    return f"results/{wildcards.model}/tokens.parquet" if needed else []


def protocols(wildcards):
    """Input function: scores of whole texts, where the configuration names a protocol."""
    named = settings(wildcards.model).evaluate.protocols
    return f"results/{wildcards.model}/protocols.parquet" if named else []


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


# ---- studies
def study(wildcards):
    """Parameter function: one study."""
    return named_study(wildcards.study)


def study_section(*names):
    """Parameter function: the named sections of a model's configuration in a study, as plain values."""

    @checked
    def chosen(wildcards):
        whole = CONFIG.for_study(wildcards.model, study(wildcards)).model_dump(mode="json")
        return {name: whole[name] for name in names}

    return chosen


@checked
def study_run(wildcards):
    """Models of a study that are not left out."""
    named = study(wildcards).models
    if not (found := [model for model in named if model not in CONFIG.skip]):
        raise BitallocError(f"no model of the study {wildcards.study} is left: {CONFIG.skip[named[0]]}")
    return found


def study_models(pattern):
    """Input function: the pattern for every model of a study."""
    return lambda wildcards: expand(pattern, study=wildcards.study, model=study_run(wildcards))


def study_runs(wildcards):
    """Parameter function: rules that are run in packed INT8 codes."""
    chosen = study(wildcards)
    return [rule for rule in ("all_low", "champion") if rule in chosen.rules and chosen.low == "int8"]


# ---- HumanEval
def written(wildcards):
    """Input function: checkpoint and table of a plan, once their gate says GO; nothing for the unquantised model."""
    if wildcards.plan == REFERENCE:
        return []
    folder = f"results/{wildcards.model}/models/{wildcards.plan}"
    return gated("compress", lambda _: [folder, f"{folder}.parquet"])(wildcards)


@checked
def permitted(wildcards):
    """Input function: the samples of a plan, where they may be executed."""
    permit(settings(wildcards.model).humaneval)
    return f"results/{wildcards.model}/humaneval/{wildcards.plan}.samples.parquet"


def executions(wildcards):
    """Outcomes of all plans that are checkpoints, and of the unquantised model."""
    plans = [*compressed_plans(wildcards), REFERENCE]
    return expand("results/{model}/humaneval/{plan}.parquet", model=wildcards.model, plan=plans)


def generation(wildcards):
    """Parameter function: the settings that samples depend on."""
    names = {"sources", "max_new_tokens", "batch"}
    chosen = settings(wildcards.model).humaneval.model_dump(mode="json", include=names)
    return section("store", "device")(wildcards) | {"humaneval": chosen}
