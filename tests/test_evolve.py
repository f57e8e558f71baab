"""Evolution on text: the fitness is what it says, the small optimum is found, and a run that was killed goes on."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from bitalloc import evolve as module
from bitalloc import figures, precision
from bitalloc.config import Evolve
from bitalloc.errors import BitallocError
from bitalloc.evolve import Bench, Genomes, degradation, evolve, fitness, segments, weights
from bitalloc.models import get_weight, load_model, set_weight
from bitalloc.store import Store
from bitalloc.tables import EVOLUTION
from tests.small import CPU, Small, small, tokens
from tests.test_precision import gpt2

PUBLISHED = Path(__file__).parent.parent / "config/maps/gpt2_published.json"
TEXT = tokens(windows=6, length=20)
QUICK = {"stages": [(40, 3), (120, 1)], "generations": 3, "offspring": 6}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Small:
    torch.set_num_threads(1)
    return small("gpt2", tmp_path_factory.mktemp("evolve"), dtype=torch.float32)


def run(bench: Small, store: Path, **how: object) -> tuple[pd.DataFrame, dict[str, str]]:
    given = {"checkpoint": bench.experiments.checkpoint, "inventory": bench.inventory, "tokens": TEXT, "device": CPU}
    return evolve(**given, settings=Evolve(**{**QUICK, **how}), store=Store(store), batch=2)


def by_hand(bench: Small, mapping: dict[str, str], split: str, count: int) -> tuple[float, float, float]:
    """(nll, reference, kl) of the first windows of the split, every matrix rounded in place, the plainest way."""
    model, source = load_model(bench.path, device=CPU), load_model(bench.path, device=CPU)
    family = bench.experiments.checkpoint.family
    for name, tensors in precision.components(bench.inventory).items():
        for layer in {tensor.rpartition(".")[0] for tensor in tensors if name != "ln_f" and tensor.endswith(".weight")}:
            W_OI, bits = get_weight(model, family, layer), precision.BITS[mapping[name]]
            if bits == 16:
                W_OI = W_OI.half().float()
            elif bits < 16:
                top = 2 ** (bits - 1) - 1
                scale_O1 = (W_OI.abs().amax(1, keepdim=True) / top).half().float()
                W_OI = (W_OI / scale_O1).round().clamp(-top, top) * scale_O1
            set_weight(model, family, layer, W_OI)
    ids = torch.from_numpy(np.stack(TEXT[TEXT["split"] == split]["tokens"].to_list())[:count]).long()
    with torch.inference_mode():
        log_p, log_q = (m(ids).logits[:, :-1].double().log_softmax(-1) for m in (source, model))
    nll, reference = (-x.gather(-1, ids[:, 1:, None]).mean().item() for x in (log_q, log_p))
    return nll, reference, (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


@pytest.fixture(scope="module")
def found(bench: Small, tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, dict[str, str]]:
    return run(bench, tmp_path_factory.mktemp("store"), seeds=2)


def test_fitness_is_compression_less_penalty_times_degradation(bench, found, tmp_path) -> None:
    frame, champion = found
    EVOLUTION.write(frame, tmp_path / "evolution.parquet")
    best = frame.loc[frame["fitness"].idxmax()]
    known = precision.components(bench.inventory)
    assert precision.parse(json.loads(best["champion"]), known) == champion and champion["ln_f"] == "fp32"
    nll, reference, kl = by_hand(bench, champion, "select", 6)
    ppl, ppl0 = math.exp(nll), math.exp(reference)
    baseline = precision.nbytes(bench.inventory, dict.fromkeys(known, "fp16"))
    size = precision.nbytes(bench.inventory, champion)
    assert best["fitness"] == pytest.approx(baseline / size - 10 * max(0, (ppl - ppl0) / ppl0), rel=1e-4)
    assert (best["nbytes"], best["compression"]) == (size, baseline / size)
    assert best[["ppl", "reference_ppl"]].astype(float).tolist() == pytest.approx([ppl, ppl0], rel=1e-5)
    assert best["kl_nats_per_token"] == pytest.approx(kl, rel=1e-3)
    nll, reference, kl = by_hand(bench, champion, "report", 6)
    assert best["report_loss_nats_per_token"] == pytest.approx(nll - reference, rel=1e-2)
    assert best["report_loss_lo"] < nll - reference < best["report_loss_hi"]
    assert best["report_kl_nats_per_token"] == pytest.approx(kl, rel=1e-3)


def test_generations_rise_from_the_baseline_and_say_what_changed(found) -> None:
    frame, _ = found
    assert list(frame["seed"].unique()) == [0, 1] and list(frame["evaluations"].unique()) == [1, 7, 13, 19]
    for _, part in frame.groupby("seed"):
        first = part.iloc[0]
        assert set(json.loads(first["champion"]).values()) == {"fp16", "fp32"}
        assert (part["fitness"].diff().dropna() >= 0).all() and part["fitness"].iloc[-1] > 1 > first["fitness"] > 0.99
        moved = part["champion"] != part["champion"].shift(fill_value=first["champion"])
        assert (moved == (part["changed"] != "")).all() and moved.any()
    assert frame["champion"][frame["seed"] == 0].iloc[-1] != frame["champion"][frame["seed"] == 1].iloc[-1]


def test_the_best_of_all_genomes_within_a_budget_is_found(bench, tmp_path) -> None:
    offered = {"precisions": ["int8", "int3"], "stages": [(20, 1)], "budget": "32kB", "fitness": "kl"}
    frame, _ = run(bench, tmp_path, **offered, generations=25)
    genomes = Genomes(bench.inventory, ["int8", "int3"], 32_000)
    parts, reach = segments(TEXT, [(20, 1)])
    device = {"store": Store(tmp_path), "device": CPU, "batch": 2}
    reader = Bench(
        bench.experiments.checkpoint, weights(bench.experiments.checkpoint), identity=0, segments=parts, **device
    )
    judge = module.Search(genomes, reader, reach, Evolve(**offered))
    every = (np.array(levels) for levels in product(*(range(top + 1) for top in genomes.space.top_G)))
    legal = [level_G for level_G in every if genomes.nbytes(level_G) <= 32_000]
    assert 30 < len(legal) < 110 and (frame["nbytes"] <= 32_000).all()
    assert frame["fitness"].iloc[-1] == pytest.approx(max(map(judge.fitness, legal)), rel=1e-5)
    assert 0 > frame["fitness"].iloc[-1] > frame["fitness"].iloc[0]


def test_a_run_that_was_killed_goes_on_with_the_genome_that_it_lost(bench, tmp_path, monkeypatch) -> None:
    short = {"generations": 2, "offspring": 4}
    whole, champion = run(bench, tmp_path / "whole", **short)
    scores, left = module.Windows.scores, iter(range(8))

    def killed(*given, **how):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return scores(*given, **how)

    monkeypatch.setattr(module.Windows, "scores", killed)
    with pytest.raises(KeyboardInterrupt):
        run(bench, tmp_path / "killed", **short)
    read = []
    monkeypatch.setattr(module.Windows, "scores", lambda *given, **how: read.append(1) or scores(*given, **how))
    resumed, again = run(bench, tmp_path / "killed", **short)
    pd.testing.assert_frame_equal(resumed, whole)
    assert again == champion
    after = len(read)
    run(bench, tmp_path / "whole", **short)
    assert len(read) == after > 5  # a run that was finished reads nothing
    run(bench, tmp_path / "other", **short)
    assert len(read) == after + after + 8


def test_the_additive_optimum_is_a_start_that_is_polished(bench, tmp_path) -> None:
    how = {"fitness": "kl", "precisions": ["fp16", "int8", "int4"], "stages": [(40, 1)], "generations": 2}
    frame, _ = run(bench, tmp_path, start="optimal", **how)
    assert frame["fitness"].iloc[-1] >= frame["fitness"].iloc[0] > 1.5  # 16 bits everywhere are worth 1
    frame, _ = run(bench, tmp_path, start="optimal", budget="40kB", **how)
    plain, _ = run(bench, tmp_path, budget="40kB", **how)
    assert frame["fitness"].iloc[-1] >= frame["fitness"].iloc[0] > plain["fitness"].iloc[0]


def test_published_champion_of_gpt2() -> None:
    """141.1 MB of 248.9 MB, 1.764x, and with PPL 30.00 against 28.48 a fitness of 1.230; scales were not counted."""
    genomes = Genomes(gpt2(), ["fp32", "fp16", "int8"])
    mapping = precision.parse(PUBLISHED, genomes.levels)
    assert len(mapping) == 27 and mapping["ln_f"] == "fp32"
    level_G = genomes.genome(mapping)
    assert genomes.mapping(level_G) == mapping and genomes.baseline == 248_879_616
    without = precision.nbytes(gpt2(), mapping, scales=False)
    assert (without, genomes.nbytes(level_G)) == (141_079_296, 141_318_562)
    lost = degradation(math.log(30.00), math.log(28.48))
    assert round(fitness(genomes.baseline / without, lost), 3) == 1.230


def test_stages_read_a_corpus_after_the_other_and_no_more_than_there_is() -> None:
    two = pd.concat([TEXT, TEXT.assign(corpus="other")])
    parts, reach = segments(two, [(40, 4), (100, 2), (10**9, 1)])
    assert [list(part["corpus"]) for part in parts[:2]] == [["noise", "other"], ["noise", "other", "noise"]]
    assert sum(map(len, parts)) == 12 and reach == [1, 2, 3]
    assert segments(two, [(10**8, 2), (10**9, 1)])[1] == [1, 1]
    with pytest.raises(BitallocError, match="no windows of the split select"):
        segments(TEXT[TEXT["split"] == "report"], [(40, 1)])


@pytest.mark.parametrize(
    ("how", "fault"),
    [
        ({"precisions": ["int8"]}, "has no legal neighbour; offer more evolve.precisions"),
        ({"budget": "1kB"}, "evolve.budget of 1,000 bytes is below the"),
        ({"budget": "much"}, "cannot read 'much' as bytes"),
    ],
)
def test_bad_input_is_one_line(bench, tmp_path, how, fault) -> None:
    with pytest.raises(BitallocError, match=fault) as error:
        run(bench, tmp_path, **how)
    assert "\n" not in str(error.value)


def test_scores_that_are_no_numbers_are_one_line_and_not_kept(bench, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "weights", lambda _: lambda layer, _level: torch.full_like(get(bench, layer), torch.nan))
        with pytest.raises(BitallocError, match=r"makes the model's scores NaN or Inf, so it has no fitness") as error:
            run(bench, tmp_path)
    assert "\n" not in str(error.value)
    assert run(bench, tmp_path)[0]["fitness"].notna().all()


def get(bench: Small, layer: str) -> torch.Tensor:
    return bench.experiments.checkpoint.weight(layer)


@pytest.mark.parametrize("stages", [[(10, 4)], [(10, 1), (5, 1)], [(10, 1), (20, 4)]])
def test_stages_that_do_not_narrow_are_refused(stages) -> None:
    with pytest.raises(ValueError, match="stages read more and more tokens"):
        Evolve(stages=stages)


def test_figure_is_drawn_to_equal_bytes(found, tmp_path) -> None:
    frame, champion = found
    for name in ("a", "b"):
        figures.evolution(frame, champion, tmp_path / name, Evolve(), model="small")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    figures.evolution(frame, champion, tmp_path / "b", Evolve(budget="1GB", fitness="kl"), model="small")
    assert (tmp_path / "a").read_bytes() != (tmp_path / "b").read_bytes()


def test_a_head_of_its_own_is_a_gene_and_other_families_have_genomes(tmp_path) -> None:
    bench = small("llama", tmp_path)
    frame, champion = run(bench, tmp_path, generations=1, offspring=2)
    assert {"wte", "lm_head", "h.2.mlp"} <= set(champion) and len(frame) == 2
    mixers = Genomes(small("mamba2", tmp_path / "mamba2").inventory, ["fp16", "int8"])
    assert {"h.0.mixer", "wte", "ln_f"} <= set(mixers.levels)
