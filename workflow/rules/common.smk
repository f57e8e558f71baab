"""The configuration, checked once, and the few functions that every rule file uses."""

import functools

from snakemake.exceptions import WorkflowError

from bitalloc import config as configuration
from bitalloc.errors import BitallocError
from bitalloc.families import family
from bitalloc.provenance import source_digest

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


def section(*names):
    """Parameter function: the named sections of a model's configuration, as plain values."""
    return lambda wildcards: {name: settings(wildcards.model).model_dump(mode="json")[name] for name in names}


def sheet(wildcards):
    """Parameter function: the model's row of the model sheet, without its settings."""
    return checked(CONFIG.model)(wildcards.model).model_dump(exclude={"settings"})


def code(*modules):
    """Parameter: digest of the code behind a rule, so that a change of it makes the rule run again."""
    return source_digest(*(f"bitalloc.{module}" for module in modules))


def threads(wildcards):
    return settings(wildcards.model).threads


def gpu(wildcards):
    return int(settings(wildcards.model).device != "cpu")
