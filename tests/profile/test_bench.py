"""Profile: formulas on a planted clock, variants in turns, what is missing said and null."""

from __future__ import annotations

import json
import mmap
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from bitalloc import config, figures
from bitalloc.errors import BitallocError
from bitalloc.formats import bitalloc
from bitalloc.profile import bench as module
from bitalloc.profile import generation, memory
from bitalloc.profile.bench import profile, rounds
from bitalloc.profile.generation import Generation, Wall, generate
from bitalloc.profile.processes import OutOfMemory
from bitalloc.profile.records import OK, frame
from bitalloc.profile.variants import Variant
from bitalloc.tables import INVENTORY, RECORDS
from tests.random_models import save
from tests.small import OPTIONS, Small, small

FILES = {"checkpoint": "checkpoint.json", "inventory": "inventory.parquet"}
SETTINGS = config.Profile(
    lengths=[8, 16], batches=[1, 2], new_tokens=4, warmup=1, iterations=3, seconds=0, resamples=50
)  # fmt: skip


class Planted:
    """A model that knows its cache: the next token is the number of tokens that it has read."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []

    def forward(self, input_ids: Any, logits_to_keep: int = 0) -> None: ...

    def __call__(self, *, input_ids: torch.Tensor, use_cache: bool, **given: Any) -> Any:
        assert use_cache
        self.asked.append((*input_ids.shape, given.get("logits_to_keep", 0)))
        read = given.get("cache_params", 0) + input_ids.shape[1]
        logits = torch.nn.functional.one_hot(torch.full((len(input_ids), 1), read), 64).float()
        return Output(logits=logits, cache_params=read)


class Output(dict):
    @property
    def logits(self) -> torch.Tensor:
        return self["logits"]


def test_a_planted_clock_gives_the_formulas() -> None:
    ticks = iter([10.0, 12.0, 12.5, 13.0, 14.0])
    model = Planted()
    found = generate(model, torch.zeros(3, 5, dtype=torch.long), 4, Wall(lambda: next(ticks)))
    assert model.asked == [(3, 5, 1), (3, 1, 0), (3, 1, 0), (3, 1, 0)]  # one prompt, then a token at a time
    assert found == Generation(3, 5, 2.0, [0.5, 0.5, 1.0])
    told = found.metrics()
    assert told["ttft_ms"] == 2000 and told["latency_ms"] == 4000 and told["itl_ms"] == 500
    assert told["tpot_ms"] == pytest.approx(1000 * (4 - 2) / (4 - 1))
    assert told["prefill_tokens_per_s"] == 3 * 5 / 2 and told["decode_tokens_per_s"] == 3 * 3 / 2


def test_events_of_a_gpu_are_waited_for_and_told_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks, waited = iter([5.0, 7.0, 7.5]), []  # milliseconds in its stream

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = next(ticks)

        def elapsed_time(self, later: Event) -> float:
            assert waited
            return later.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    clock = generation.Events()
    for _ in range(3):
        clock.mark()
    assert clock.seconds() == [0.002, 0.0005]


@pytest.mark.skipif(memory.high_water() is None, reason="the system does not tell")
def test_a_peak_is_told_once_and_then_begins_anew() -> None:
    memory.set_back("cpu")
    before = memory.high_water()
    with mmap.mmap(-1, 100_000_000) as held:  # a freed block of the heap may stay resident, what was mapped does not
        held[:: mmap.PAGESIZE] = b"x" * len(range(0, len(held), mmap.PAGESIZE))
    assert memory.high_water() - before > 90
    assert memory.high_water() - before < 50  # it was set back by the look before, and the memory is free


def test_rounds_interleave_and_go_on_until_all_have_enough() -> None:
    seconds, asked = {"a": 1.0, "b": 0.25}, []

    def one(name: str) -> Generation:
        asked.append(name)
        return Generation(1, 1, seconds[name], [0.0])

    settings = SETTINGS.model_copy(update={"iterations": 3, "seconds": 2.0, "warmup": 2})
    found = rounds(["a", "b"], one, settings, np.random.default_rng(0))
    assert [len(each) for each in found.values()] == [8, 8]  # b takes 2 seconds in 8 of them
    assert asked[:4] == ["a", "b", "a", "b"]  # warm-up, which does not count
    turns = [set(asked[place : place + 2]) for place in range(4, len(asked), 2)]
    assert turns == [{"a", "b"}] * 8


# ---- really run
@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return small("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def measured(bench: Small, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """What the script of the workflow writes."""
    results = tmp_path_factory.mktemp("results")
    plan = results / "models/plan"
    bitalloc.save(
        plan, source=bench.experiments.checkpoint, inventory=bench.inventory, plan=bench.plan(OPTIONS[:2]),
        matrix=bench.experiments.matrix, sweep=bench.experiments.sweep, extra={},
    )  # fmt: skip
    where = {"path": str(bench.path), "family": "llama", "revision": "local"}
    (results / "checkpoint.json").write_text(json.dumps(where))
    INVENTORY.write(bench.inventory, results / "inventory.parquet")
    asked = SETTINGS.model_dump() | {
        "variants": ["reference", "plan:dequantised", "plan:native", "plan:gptq"], "lengths": [16, 61],
        "priced_as": "here", "utilisation": 0.5,
        "prices": {"here": {"usd_per_hour": 3.6, "source": "a list", "date": "2026-01-31"}},
    }  # fmt: skip
    runpy.run_path("scripts/profile_model.py")["main"](
        inputs={name: results / file for name, file in FILES.items()},
        plans=[plan],
        settings=config.parse({"profile": asked, "device": "cpu", "threads": 1}),
        remote_code=False,
        outputs={"table": results / "profile.parquet", "figure": results / "profile.png"},
    )
    assert not list(results.glob(".*"))
    found = RECORDS.read(results / "profile.parquet")
    found.attrs["figure"] = (results / "profile.png").read_bytes()
    return found


def pick(measured: pd.DataFrame, variant: str, metric: str, **at: int) -> pd.Series:
    chosen = measured[(measured["variant"] == variant) & (measured["metric"] == metric)]
    for name, value in at.items():
        chosen = chosen[chosen[name] == value]
    assert len(chosen) == 1, (variant, metric, at)
    return chosen.iloc[0]


def test_every_variant_has_every_number_or_says_why_not(measured: pd.DataFrame) -> None:
    absent = measured["value"].isna()
    assert (measured["status"].eq(OK) == ~absent).all()
    assert not measured.loc[~absent, "value"].eq(0).any()  # what is absent is null, not 0
    for variant in ("reference", "plan:native"):
        at = {"batch": 2, "prompt_length": 16}
        speed = pick(measured, variant, "decode_tokens_per_s", **at)
        assert speed["n"] >= 3 and speed["lo"] <= speed["q25"] <= speed["value"] <= speed["hi"]
        assert pick(measured, variant, "prefill_mem_mb", **at)["value"] > 50
        libraries, loaded = (pick(measured, variant, f"{name}_mem_mb")["value"] for name in ("libraries", "load"))
        assert 50 < libraries <= loaded
    assert pick(measured, "plan:native", "nbytes")["value"] < pick(measured, "reference", "nbytes")["value"]


def test_speedups_are_over_the_first_variant_and_none_is_told_of_itself(measured: pd.DataFrame) -> None:
    at = {"batch": 1, "prompt_length": 16}
    assert "first variant" in pick(measured, "reference", "decode_speedup", **at)["status"]
    assert pick(measured, "plan:native", "decode_speedup", **at)["value"] > 0


def test_facts_of_the_precision_stand_beside(measured: pd.DataFrame) -> None:
    row = pick(measured, "plan:native", "load_s")
    assert 2 < row["w_bits"] < 3 and row["group_size"] == 16 and not row["per_channel"] and not row["simulated"]
    assert row["quant_backend"] == "native" and row["calib_method"] == "rtn" and len(row["scope_digest"]) == 64
    assert pick(measured, "plan:dequantised", "load_s")["simulated"]
    whole = pick(measured, "reference", "load_s")
    assert whole["w_bits"] == 16 and pd.isna(whole["quant_backend"]) and whole["dtype"] == "float32"
    assert whole["threads"] == 1 and whole["isa"] and pd.isna(whole["scan_path"])


def test_a_prompt_beyond_the_context_and_a_backend_that_refuses_are_told(measured: pd.DataFrame) -> None:
    assert pick(measured, "reference", "ttft_ms", batch=1, prompt_length=61)["status"] == (
        "61 + 4 tokens are more than the model's context of 64"
    )
    assert "rank" in pick(measured, "plan:gptq", "load_s")["status"]
    assert "rank" in pick(measured, "plan:gptq", "prefill_mem_mb", batch=1, prompt_length=16)["status"]


def test_a_million_tokens_cost_what_the_price_says(measured: pd.DataFrame) -> None:
    at = {"batch": 2, "prompt_length": 16}
    for metric, rate in module.COST.items():
        cost, speed = pick(measured, "reference", metric, **at), pick(measured, "reference", rate, **at)
        assert cost["value"] == pytest.approx(3.6e6 / (3600 * speed["value"] * 0.5))
        assert cost["lo"] == pytest.approx(3.6e6 / (3600 * speed["hi"] * 0.5))
        assert "a list, 2026-01-31" in cost["notes"] and "utilisation 0.5" in cost["notes"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"priced_as": "a10", "prices": {"a10": {}}}, "the price of 'a10' is null"),
        ({"priced_as": "a1", "prices": {"a10": {}}}, "did you mean 'a10'"),
        ({"prices": {"a10": {"usd_per_hour": 1.0}}}, "needs its `source` and its `date`"),
        ({"prices": {"a10": {"usd_per_our": 1.0}}}, "did you mean 'usd_per_hour'"),
        ({"length": [1]}, "did you mean 'lengths'"),
    ],
)
def test_a_price_that_is_null_is_an_error_where_cost_is_asked(given: dict, said: str) -> None:
    with pytest.raises(BitallocError, match=said) as error:
        config.parse({"profile": given})
    assert "\n" not in str(error.value)


def test_the_page_leaves_out_what_was_only_simulated(measured: pd.DataFrame, tmp_path: Path) -> None:
    figures.profile(measured, tmp_path / "profile.png", model="small")
    assert (tmp_path / "profile.png").read_bytes() == measured.attrs["figure"]
    said = figures.profile.__globals__["message"](measured)
    assert "plan:native" in said and "dequantised" not in said


def test_a_state_space_model_goes_on_from_its_state_and_says_how_it_scans(tmp_path: Path) -> None:
    save("mamba2", tmp_path)
    holder = generation.Holder(Variant("reference", tmp_path, "cpu", 1), 0)
    facts, _ = holder.facts()
    assert facts["scan_path"] == "matrix"
    model, tokens_BT = holder._loaded.model, holder._prompts(2, 9)
    token_B1, cache = generation.prefill(model, tokens_BT)
    with torch.inference_mode():
        whole = model(torch.cat([tokens_BT, token_B1], 1)).logits[:, -1:].argmax(-1)
    assert torch.equal(generation._step(model, token_B1, cache)[0], whole)


# ---- memory that is not there
class Forgetful:
    """Stands in for the server: each variant has so many cells' worth of memory, and all together so many."""

    def __init__(self, room: dict[str, int], together: int = 9) -> None:
        self.room, self.together, self.held = room, together, 0

    def __enter__(self) -> Forgetful:
        return self

    def __exit__(self, *_: object) -> None: ...

    def start(self, _: str, variant: Variant, *__: object) -> Any:
        self.held += 1

        def call(method: str, *given: Any) -> Any:
            if method == "facts":
                return {"simulated": False, "device": "cpu"}, {"nbytes": 1}
            if self.held > self.together or given[0] * given[1] > self.room[variant.name]:
                raise OutOfMemory("no more")
            return {"prefill_mem_mb": 1.0} if method == "memory" else Generation(*given[:2], 1.0, [1.0, 1.0, 1.0])

        return SimpleNamespace(call=call, close=lambda: setattr(self, "held", self.held - 1))


@pytest.fixture
def forgetful(bench: Small, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def run(room: dict[str, int], together: int = 9) -> pd.DataFrame:
        monkeypatch.setattr(module, "Server", lambda *_: Forgetful(room, together))
        made = [Variant(name, bench.path, "cpu", 1) for name in room]
        return frame(profile(made, model="small", settings=SETTINGS, run_id="r"))

    return run


def test_missing_memory_is_a_status_and_larger_cells_are_not_tried(forgetful: Any) -> None:
    found = forgetful({"reference": 99, "plan:native": 8})
    at = {"metric": "decode_tokens_per_s"}
    status = {
        (batch, length): pick(found, "plan:native", **at, batch=batch, prompt_length=length)["status"]
        for batch in (1, 2)
        for length in (8, 16)
    }
    assert status == {
        (1, 8): OK,
        (1, 16): "out of memory: no more",
        (2, 8): "out of memory: no more",
        (2, 16): "not tried: out of memory at batch 1, 16 tokens",
    }
    lost = found[(found["variant"] == "plan:native") & (found["status"] != OK)]
    assert lost["value"].isna().all()
    assert pick(found, "reference", **at, batch=2, prompt_length=16)["status"] == OK  # the others go on
    assert pick(found, "plan:native", "prefill_mem_mb", batch=2, prompt_length=16)["value"] is None


def test_variants_that_do_not_fit_side_by_side_are_timed_alone_and_no_speedup_is_told(forgetful: Any) -> None:
    found = forgetful({"reference": 99, "plan:native": 99}, together=1)
    row = pick(found, "plan:native", "decode_tokens_per_s", batch=1, prompt_length=8)
    assert row["status"] == OK and "timed alone" in row["notes"]
    speed = pick(found, "plan:native", "decode_speedup", batch=1, prompt_length=8)
    assert speed["value"] is None and speed["status"] == "not timed beside the first variant"
