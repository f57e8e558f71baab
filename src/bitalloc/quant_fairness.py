"""quant-fairness: which layers to protect so that no language pays for the others. See `quant-fairness --help`.

`sweep` asks the model and writes its tables into a folder; `recommend` and `report` go on from there without it.
`recommend` therefore chooses among sets that the sweep has read, for any budget and margin; where an unread set
promises more it says so, and `sweep` with that budget reads it. Exit status: 0; 1 for bad input, in one line; 2 for a
command line that cannot be read; 130 when interrupted (the same command goes on where it was).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bitalloc import fairness
from bitalloc.config import Config, load, parse_bytes
from bitalloc.corpus import UnavailableError, hub, load_tokenizer
from bitalloc.errors import BitallocError, nearest
from bitalloc.fairness import ALL, FAIR, NONE, REFERENCE, Damage, Search, Units
from bitalloc.families import FAMILIES, Family, family
from bitalloc.progress import Progress, clock
from bitalloc.store import Store, canonical, write_atomically
from bitalloc.tables import ANSWERS, ARMS, FAIRNESS, PROTECTED, SENTENCES, SETS, SYNERGY

UNSURE = 0.5  # confidence below which the recommendation is said to be unsure
SHEET = Path("config/models.yaml")
_BPW = re.compile(r"([0-9]*\.?[0-9]+) ?bpw")


class Bar(Progress):
    """A bar that is drawn over itself in a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        super().__init__("sweep", 0, unit="plans", every_s=0.2 if sys.stderr.isatty() else 5.0)

    def say(self, note: str = "") -> None:
        if not sys.stderr.isatty():
            return super().say(note)
        import time

        fresh, elapsed = self.done - self.cached, time.monotonic() - self.start
        left = clock(elapsed / fresh * max(0, self.total - self.done)) if fresh else "?"
        filled = round(30 * self.done / max(self.total, self.done, 1))
        bar = "#" * filled + "." * (30 - filled)
        print(f"\r\x1b[K[{bar}] {self.done} of {self.total} plans, {left} left, {note}", end="", file=sys.stderr)
        if self.done >= self.total:
            print(file=sys.stderr)


# ---- the model ---------------------------------------------------------------------------------------
def find(name: str) -> tuple[str, Path, Family]:
    """(name, folder, family) of a folder, a model of config/models.yaml, or a hub id; in that order."""
    from bitalloc.models import read_config
    from bitalloc.retrieve import FILES, resolve

    sheet = load(SHEET) if SHEET.is_file() else Config()
    if Path(name).is_dir():
        label, folder = Path(name).resolve().name, Path(name)
    elif name in sheet.models:
        label, (folder, _) = name, resolve(name, sheet.models[name])
    else:
        try:
            label, folder = name.rpartition("/")[2], hub(name, revision="main", files=FILES)
        except UnavailableError as reason:
            close = f"; {nearest(name, sheet.models)} ({SHEET})" if sheet.models else ""
            raise BitallocError(
                f"model {name!r}: no such folder, not in {SHEET}, and not from the hub ({reason}){close}"
            ) from None
    raw = read_config(folder)
    for known in FAMILIES.values():
        if raw.get("model_type") == known.name or set(raw.get("architectures") or ()) & set(known.architectures):
            return label, folder, family(known.name)
    raise BitallocError(f"{folder}: family {raw.get('model_type')!r} is unknown; known: {', '.join(sorted(FAMILIES))}")


def parse_budget(text: str | None, units: Units) -> tuple[str, int]:
    """(text, bytes of the whole checkpoint) of "5.2bpw", over all matrices that may be rounded, "8GB" or "1200000".

    Without a text what the published pattern takes. Raises `BitallocError` for what cannot be read or reached.

    >>> units = Units({"h.0": 60}, base=100, rest=20, weights=160)
    >>> parse_budget("5bpw", units), parse_budget("150", units), parse_budget(None, units)
    (('5bpw', 120), ('150', 150), ('as L0 + L9 + L11', 160))
    """
    if text is None:
        return "as L0 + L9 + L11", units.nbytes(fairness.published(units))
    if match := _BPW.fullmatch(text.strip()):
        nbytes = units.budget(float(match[1]))
    else:
        try:
            nbytes = parse_bytes(text)
        except BitallocError as error:
            raise BitallocError(f"--budget {text!r}: {error}; or 5.2bpw") from None
    units.require(nbytes, text)
    return text, nbytes


# ---- the commands --------------------------------------------------------------------------------------
def sweep(given: argparse.Namespace) -> None:
    """Read the model, search, and say what to protect."""
    from bitalloc import languages
    from bitalloc.models import Checkpoint, pick_device, read_config
    from bitalloc.retrieve import inventory, items

    if given.protect_bits <= given.bits:
        raise BitallocError(f"--protect-bits {given.protect_bits} must be more than --bits {given.bits}")
    named = [name.strip() for name in given.langs.split(",") if name.strip()]
    built_in = not given.text
    text = languages.built_in(named) if built_in else languages.read(_texts(given.text), named)
    name, folder, kin = find(given.model)
    raw = read_config(folder)
    text = languages.tokenise(text, load_tokenizer(folder), raw)
    text = languages.split(text, sentences=given.sentences, seed=given.seed)
    out = given.out or Path("results/quant-fairness") / name
    asked = None
    if built_in and given.items:
        asked = items(Config(seed=given.seed, retrieve={"items": {"facts": given.items}}), folder)  # type: ignore[arg-type]
        asked = asked[asked["group"].isin(named)].reset_index(drop=True)
    bench = languages.Bench(
        name,
        Checkpoint(folder, kin),
        inventory(name, folder, kin),
        text,
        low=languages.LOW[given.bits],
        high=languages.HIGH[given.protect_bits],
        store=Store(out / "store"),
        device=pick_device(given.device),
        batch=given.batch,
        items=asked,
    )
    budget, nbytes = parse_budget(given.budget, bench.units)
    how = {"margin": given.margin_en, "seed": given.seed}
    found = languages.study(bench, nbytes, asked=budget, pairs=given.pairs, progress=Bar(), **how)
    SENTENCES.write(found.sentences, out / "sentences.parquet")
    SETS.write(found.sets, out / "sets.parquet")
    ARMS.write(found.arms, out / "arms.parquet")
    if found.answers is not None:
        ANSWERS.write(found.answers, out / "answers.parquet")
    else:
        (out / "answers.parquet").unlink(missing_ok=True)
    print(f"tables: {out}", file=sys.stderr)
    given.folder = out
    _report(given, keep=True)


def _texts(given: Sequence[str]) -> Path | dict[str, Path]:
    """One folder, or files by language."""
    if len(given) == 1 and "=" not in given[0]:
        return Path(given[0])
    if wrong := [each for each in given if "=" not in each]:
        raise BitallocError(f"--text {wrong[0]}: give one folder, or en=/a/file for every language")
    return {language: Path(file) for language, _, file in (each.partition("=") for each in given)}


def report(given: argparse.Namespace) -> None:
    """Tell what a sweep found, at the budget that it was made for; only the files that are asked for are written."""
    _report(given, keep=False)


def _report(given: argparse.Namespace, *, keep: bool) -> None:
    """`keep`: write what is derived beside the sweep's tables too; the workflow's folders are its own."""
    folder = given.folder
    sentences, sets, arms = _read(folder)
    answers = ANSWERS.read(folder / "answers.parquet") if (folder / "answers.parquet").is_file() else None
    how = {"seed": given.seed}
    select, _ = Damage.both(sentences, **how)
    units, table = Units.of(sets), fairness.fairness(sentences, sets, arms, answers, **how)
    protected, found = pd.DataFrame(columns=PROTECTED.names), None
    budget, nbytes = arms["budget"].iloc[0], int(arms["budget_nbytes"].iloc[0])
    if select.ranked:
        found = fairness.choose(select, units, nbytes, margin=given.margin_en)
        recorded = arms.loc[arms["arm"] == FAIR, "plan"].item()
        if found.plan != recorded:
            raise BitallocError(
                f"{folder} was swept with another --margin-en or --seed ({recorded}, not {found.plan}); give the same"
            )
        protected = fairness.protected(select, units, found, budget)
    if keep:
        FAIRNESS.write(table, folder / "fairness.parquet")
    if keep and found:
        PROTECTED.write(protected, folder / "protected.parquet")
        SYNERGY.write(fairness.synergies(select, units), folder / "synergy.parquet")
        _write_map(found.plan, sets, units, folder / "protect.json")
    if given.parquet:
        FAIRNESS.write(table, given.parquet)
    if given.figure:
        from bitalloc import figures

        figures.fairness(table, protected, given.figure, note=fairness.conditions(sets, arms))
    told = {"table": json.loads(table.to_json(orient="records")), "protect": None}
    if found:
        told["protect"] = _recommended(found, units, nbytes)
    lines = [fairness.conditions(sets, arms), "", *_languages(table), "", *_arms(table, nbytes), ""]
    _tell(given.json, told, lines + _protected(protected, found, units))


def recommend(given: argparse.Namespace) -> None:
    """Choose among the sets that a sweep has read, for another budget or margin; the model is not asked."""
    sentences, sets, _ = _read(given.folder)
    select, after = Damage.both(sentences, seed=given.seed)
    units = Units.of(sets)
    budget, nbytes = parse_budget(given.budget, units)
    found = fairness.choose(select, units, nbytes, margin=given.margin_en)
    worst = {"select": select, "report": after}
    lines = _protected(fairness.protected(select, units, found, budget), found, units)
    for split, damage in worst.items():
        if found.plan in damage.nll:
            (row,) = [row for row in damage.rows(found.plan) if row["metric"] == "worst_rel"]
            lines.append(f"worst relative damage on the {split} split: {_interval(row)}")
        else:
            lines.append(f"not read on the {split} split: `quant-fairness sweep --budget {budget}` reads it there")
    search = Search(units, nbytes, select, lambda sets: None)
    promising = search.promising(lambda relative_L: float(np.max(relative_L[select.ranked])))
    promised = float(np.max(search.predict(promising)[select.ranked]))
    if not search.measured(promising) and promised < select.worst(found.plan)[0]:
        again = f"`quant-fairness sweep --budget {budget}` reads it"
        lines.append(f"unread: {units.name(promising)} promises {promised:.2%}; {again}")
    if given.map:
        _write_map(found.plan, sets, units, given.map)
    _tell(given.json, {"protect": _recommended(found, units, nbytes)}, lines)


def _read(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    if not (folder / "sentences.parquet").is_file():
        raise BitallocError(f"{folder} holds no sweep; run `quant-fairness sweep --model ... --out {folder}` first")
    return (
        SENTENCES.read(folder / "sentences.parquet"),
        SETS.read(folder / "sets.parquet"),
        ARMS.read(folder / "arms.parquet"),
    )


def _write_map(plan: str, sets: pd.DataFrame, units: Units, path: Path) -> None:
    """The precision map of a set, for `allocate.plans`."""
    first = sets.iloc[0]
    chosen = units.parse(plan)
    named = {"default": first["low"]} | {unit: first["high"] for unit in units.added if unit in chosen}
    write_atomically(path, (json.dumps(named, indent=1) + "\n").encode())


def _recommended(found: fairness.Choice, units: Units, budget: int) -> dict[str, Any]:
    nbytes = units.nbytes(units.parse(found.plan))
    return {
        "units": [] if found.plan == NONE else found.plan.split("+"),
        "added_nbytes": nbytes - units.base,
        "nbytes": nbytes,
        "bits_per_weight": units.bits_per_weight(nbytes),
        "budget_nbytes": budget,
        "confidence": found.confidence,
        "frequency": dict(found.frequency),
    }


# ---- the terminal ----------------------------------------------------------------------------------------
def _tell(where: Path | None, told: dict[str, Any], lines: Sequence[str]) -> None:
    """Lines to the terminal; JSON to its file, or to stdout alone for `-`."""
    if where is not None:
        text = json.dumps(json.loads(canonical(told)), indent=1)
        if str(where) == "-":
            print(text, flush=True)
            return
        write_atomically(where, (text + "\n").encode())
    print("\n".join(lines), flush=True)


def _interval(row: Any) -> str:
    return f"{row['value']:.2%} [{row['lo']:.2%}, {row['hi']:.2%}]"


def _grid(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _languages(table: pd.DataFrame) -> list[str]:
    of = table.set_index(["arm", "language", "metric"]).sort_index()
    fair = bool((table["arm"] == FAIR).any())
    rows = [["language", "bits/byte", "unigram", "fertility", "damage, nothing protected", "nats a sentence"]]
    shown = [REFERENCE, NONE, *[FAIR] * fair]
    asked = bool((table["metric"] == "acc").any())
    rows[0] += ["damage, fair set"] * fair + [f"accuracy: {', '.join(shown)}"] * asked + [""]
    for language in dict.fromkeys(table.loc[table["arm"] == REFERENCE, "language"]):

        def value(arm: str, metric: str, form: str = ".3f", language: str = language) -> str:
            key = (arm, language, metric)
            return format(of.loc[key, "value"], form) if key in of.index else ""

        none = of.loc[(NONE, language, "damage_rel")]
        row = [language, *(value(REFERENCE, f"{each}_bits_per_byte") for each in ("reference", "unigram"))]
        row += [value(REFERENCE, "fertility", ".2f"), _interval(none), value(NONE, "damage_nats")]
        row += [_interval(of.loc[(FAIR, language, "damage_rel")])] if fair else []
        row += [", ".join(value(arm, "acc", ".2f") for arm in shown)] * asked
        rows.append([*row, "floor: not ranked" if none["status"] == "floor" else ""])
    return _grid(rows)


def _arms(table: pd.DataFrame, budget: int) -> list[str]:
    over = table[table["language"] == ALL].pivot(index="arm", columns="metric", values=["value", "lo", "hi"])
    if over.empty:
        return ["no language is ranked: in none is the model surely better than byte unigrams"]
    rows = [["arm", "protects", "bytes", "worst damage", "gap", "ratio", "worse than fair by"]]
    shown = [arm for arm in dict.fromkeys(table["arm"]) if arm in over.index and not arm.startswith("random-")]
    for arm in shown:
        first = table[table["arm"] == arm].iloc[0]

        def cell(metric: str, arm: str = arm) -> str:
            row = {end: over.loc[arm, (end, metric)] for end in ("value", "lo", "hi")}
            return "" if math.isnan(row["value"]) else _interval(row)

        gap, ratio = over.loc[arm, ("value", "gap")], over.loc[arm, ("value", "ratio")]
        rows.append(
            [
                arm,
                first["plan"] or first["status"],
                ""
                if math.isnan(first["nbytes"])
                else f"{int(first['nbytes']):,}" + " (over)" * int(first["nbytes"] > budget),
                cell("worst_rel"),
                "" if math.isnan(gap) else f"{gap:.2%}",
                "" if math.isnan(ratio) else f"{ratio:.2f}",
                "" if arm == FAIR else cell("worst_rel_over_fair"),
            ]
        )
    return _grid(rows)


def _protected(table: pd.DataFrame, found: fairness.Choice | None, units: Units) -> list[str]:
    if found is None:
        return ["nothing is recommended"]
    rows = [["unit", "adds bytes", "alone saves of the worst", "selected", ""]]
    for row in table.to_dict("records"):
        chosen = "protect" if row["chosen"] else ""
        rows.append([row["unit"], f"{row['nbytes']:,}", _interval(row), f"{row['frequency']:.0%}", chosen])
    nbytes = units.nbytes(units.parse(found.plan))
    kept = "nothing" if found.plan == NONE else found.plan.replace("+", ", ")
    unsure = ["unsure: other sets win more often than not; give more sentences"] * (found.confidence < UNSURE)
    return [
        *_grid(rows),
        "",
        f"protect {kept}: {nbytes - units.base:,} bytes more, {nbytes:,} in all "
        f"({units.bits_per_weight(nbytes):.2f} bpw); the same set in {found.confidence:.0%} of resamples",
        *unsure,
    ]


# ---- the command line ---------------------------------------------------------------------------------------
def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quant-fairness", description=__doc__.partition(". See")[0].partition(": ")[2]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (sweep, recommend, report):
        own = commands.add_parser(command.__name__, help=command.__doc__, description=command.__doc__)
        own.set_defaults(run=command)
        if command is sweep:
            own.add_argument("--model", required=True, help="folder, name in config/models.yaml, or hub id")
            own.add_argument("--langs", default="en,he,ar,zh", help="languages with commas; default: %(default)s")
            own.add_argument(
                "--text", action="append", metavar="DIR|en=FILE",
                help="aligned text, one sentence a line: a folder of en.txt and so on, or en=FILE again and again; "
                "default: built in, the languages of the embedded model (en, he, ar, zh)",
            )  # fmt: skip
            own.add_argument("--bits", type=int, choices=[2, 3, 4, 8], default=4, help="default: %(default)s")
            own.add_argument("--protect-bits", type=int, choices=[3, 4, 8, 16], default=16, help="default: %(default)s")
            own.add_argument("--sentences", type=_positive, help="how many are drawn for both splits; default: all")
            own.add_argument("--items", type=int, default=384, metavar="N",
                             help="multiple-choice questions beside the built-in text: %(default)s")  # fmt: skip
            own.add_argument("--pairs", type=_positive, default=100, help="pairs that are read at most: %(default)s")
            own.add_argument("--batch", type=_positive, default=16, help="sentences a forward pass: %(default)s")
            own.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: %(default)s")
            own.add_argument("--out", type=Path, metavar="DIR", help="tables; default: results/quant-fairness/<model>")
        else:
            own.add_argument(
                "folder", type=Path, help="what `sweep` wrote, its --out; or results/<model>/fairness of the workflow"
            )
        if command is not report:
            own.add_argument(
                "--budget",
                help="5.2bpw, over all matrices, embeddings too; or bytes of the checkpoint: 8GB, 1200000; default: "
                "what blocks 0, 9 and 11 of 12 take",
            )
        if command is recommend:
            own.add_argument("--map", type=Path, metavar="FILE", help="write the precision map, for allocate.plans")
        else:
            own.add_argument("--parquet", type=Path, metavar="FILE", help="write the table `fairness` there too")
            own.add_argument("--figure", type=Path, metavar="FILE", help="draw a PNG")
        own.add_argument(
            "--margin-en", type=_margin, default=0.01, metavar="X",
            help="relative damage that English may bear above that of nothing protected, upper end: %(default)s",
        )  # fmt: skip
        own.add_argument("--seed", type=int, default=0, help="of splits, resamples and random sets: %(default)s")
        own.add_argument("--json", type=Path, metavar="FILE", help="write JSON; - prints it instead of the table")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _margin(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 0 or more")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    given = _parser().parse_args(arguments)
    try:
        given.run(given)
    except BitallocError as error:
        print(f"quant-fairness: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nquant-fairness: interrupted; the same command goes on where it was", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the table, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
