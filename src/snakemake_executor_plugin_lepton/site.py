"""The site file: everything about a Lepton workspace that a user has to say, once, and the body of a job from it."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

DAY_S = 86_400
UNSHARED = "snakemake-lepton: this is not the folder of the head"


class SiteError(ValueError):
    """A fault in the site file or in what a job asks for: one line with the remedy."""


@dataclass(frozen=True)
class Shape:
    """A resource shape as `lep node resource-shape` lists it; `mem_mb: null` means that memory never decides."""

    name: str
    gpu: int
    mem_mb: int | None = None
    usd_per_hour: float | None = None
    source: str | None = None  # of the price
    dated: str | None = None


@dataclass(frozen=True)
class Site:
    """One Lepton workspace, as its site file describes it. Secrets are named, their values never stand there."""

    image: str
    shapes: tuple[Shape, ...]
    node_group: str | None = None
    mounts: tuple[Mapping[str, Any], ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict)
    image_pull_secrets: tuple[str, ...] = ()
    timeout_s: float = 30.0  # of one request
    pause_s: float = 10.0  # before a request is tried again
    settle_s: float = 30.0  # in which a request without an answer may still take effect
    stop_s: float = 300.0  # for which stopping jobs is tried

    @classmethod
    def read(cls, path: Path) -> Site:
        """Raises `SiteError` for a file that cannot be read, an unknown key, a missing or malformed value."""
        import yaml

        try:
            given = yaml.safe_load(path.read_text())
        except (OSError, yaml.YAMLError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error).split("\n")[0]
            raise SiteError(f"cannot read the site file {path}: {reason}") from None
        names = [item.name for item in fields(cls)]
        if not isinstance(given, dict):
            raise SiteError(f"{path} is no site file: it must have the keys image and shapes")
        for key in given:
            if key not in names:
                near = difflib.get_close_matches(str(key), names, 1) or names
                raise SiteError(f"{path}: unknown key {key!r}; did you mean {near[0]!r}?")
        for key in ("image", "shapes"):
            if not given.get(key):
                raise SiteError(f"{path}: {key} is missing; fill it in")
        try:
            shapes = tuple(Shape(**shape) for shape in given["shapes"])
            site = cls(**{**given, "shapes": shapes})
            numbers = [number for shape in shapes for number in (shape.gpu, shape.mem_mb or 1)]
            ok = all(isinstance(number, int) and number >= 0 for number in numbers)
            ok &= all(getattr(site, name) > 0 for name in names if name.endswith("_s"))
            ok &= isinstance(site.env, dict) and isinstance(site.secrets, dict)
            ok &= all({"from", "mount_path"} <= set(mount) for mount in site.mounts)
        except TypeError:
            ok = False
        if not ok:
            raise SiteError(f"{path}: a value is of the wrong kind; compare it with profiles/lepton/site.yaml")
        for shape in shapes:
            if shape.usd_per_hour is not None and not (shape.source and shape.dated):
                raise SiteError(f"{path}: {shape.name} has a price without source and date; add `source` and `dated`")
        return site

    def cost(self, seconds: Mapping[str, float]) -> float:
        """US dollars for so many seconds on each shape. Raises `SiteError` for one without a price: it is not free."""
        prices = {shape.name: shape.usd_per_hour for shape in self.shapes}
        for name in seconds:
            if prices.get(name) is None:
                raise SiteError(f"no price of {name} in the site file; fill in usd_per_hour, source and dated")
        return sum(prices[name] * spent / 3600 for name, spent in seconds.items())

    def shape(self, *, gpu: int, mem_mb: int) -> str:
        """The first shape of exactly `gpu` GPUs whose memory suffices.

        >>> site = Site("image", (Shape("cpu.small", 0, 4_000), Shape("cpu.large", 0, 16_000), Shape("gpu.a10", 1)))
        >>> site.shape(gpu=0, mem_mb=8_000), site.shape(gpu=1, mem_mb=99_000)
        ('cpu.large', 'gpu.a10')
        """
        for shape in self.shapes:
            if shape.gpu == gpu and (shape.mem_mb is None or shape.mem_mb >= mem_mb):
                return shape.name
        raise SiteError(f"no shape in the site file has {gpu} GPUs and {mem_mb:,} MB; add one, or set lepton_shape")

    def body(self, *, name: str, shape: str, labels: Mapping[str, str], command: str) -> dict[str, Any]:
        """What is posted to create a job that runs `command` in bash, once: snakemake is who tries again."""
        spec: dict[str, Any] = {
            "resource_shape": shape,
            "container": {"image": self.image, "command": ["/bin/bash", "-c", command]},
            "completions": 1,
            "parallelism": 1,
            "max_failure_retry": 0,
            "max_job_failure_retry": 0,
            "envs": [{"name": name, "value": str(value)} for name, value in self.env.items()]
            + [{"name": name, "value_from": {"secret_name_ref": secret}} for name, secret in self.secrets.items()],
            "mounts": [dict(mount) for mount in self.mounts],
            "image_pull_secrets": list(self.image_pull_secrets),
            "ttl_seconds_after_finished": 3 * DAY_S,  # a head that was gone for a weekend still learns how jobs ended
        }
        if self.node_group:
            spec["affinity"] = {"allowed_dedicated_node_groups": [self.node_group]}
        return {"metadata": {"id": name, "labels": dict(labels)}, "spec": spec}


def job_name(rule: str, number: int | str) -> str:
    """A name that Lepton takes: at most 36 of [a-z0-9-], beginning with a letter, the number last.

    >>> job_name("Sweep__Embeddings_of_a_very_long_rule", 8399)
    'smk-sweep-embeddings-of-a-8399'
    """
    slug = re.sub(r"[^a-z0-9]+", "-", rule.lower())[:22].strip("-")
    number = re.sub(r"[^a-z0-9]", "", str(number).lower())[-8:]
    return f"smk-{slug}-{number}".replace("--", "-")


def command(*, folder: Path, probe: Path, nonce: str, log: Path, runtime_min: int | None, run: str) -> str:
    """The job's command. It first looks for the file that the head wrote: the mount must be the head's folder."""
    where, line = shlex.quote(str(folder)), shlex.quote(f"{UNSHARED} {folder}")
    limit = f"timeout --kill-after=30 {runtime_min}m " if runtime_min else ""
    return "\n".join(
        [
            f'{{ cd {where} && [ "$(cat {shlex.quote(str(probe))})" = {shlex.quote(nonce)} ]; }} 2>/dev/null '
            f"|| {{ echo {line}; exit 97; }}",
            f"exec >>{shlex.quote(str(log))} 2>&1 </dev/null",
            f"exec {limit}/bin/bash -c {shlex.quote(run)}",
        ]
    )
