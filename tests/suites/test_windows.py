"""Perplexity and divergence against independent computations, on every family."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from bitalloc.errors import BitallocError
from bitalloc.families import FAMILIES
from bitalloc.suites import SUITES, Head, Scored, Windows, scoring
from tests.random_models import VOCABULARY, build

CPU = torch.device("cpu")
EVERY = pytest.mark.parametrize("family", list(FAMILIES))
NO_ITEMS = pd.DataFrame(columns=["task", "item", "group", "prompt", "choices", "answer", "chance"])


def frame(windows: int = 3, length: int = 20, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    rows = [
        {"split": "report", "corpus": corpus, "window": window, "nbytes": int(rng.integers(30, 90))}
        | {"tokens": rng.integers(0, VOCABULARY, length).astype(np.int32)}
        for corpus in ("a", "b")
        for window in range(windows)
    ]
    return pd.DataFrame(rows)


def scored(model: Any, reference: Any, windows: Windows) -> Scored:
    return Scored(model, Head(model), windows, NO_ITEMS, windows.parted(windows.hidden(reference)))


def spoilt(family: str) -> Any:
    """The same model with noise in its blocks; embeddings and head stay."""
    model = build(family)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.get_submodule(FAMILIES[family].blocks).parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def values(rows: pd.DataFrame, metric: str) -> np.ndarray:
    return rows.loc[rows["metric"] == metric, "value"].to_numpy()


@EVERY
def test_perplexity_is_the_loss_of_transformers(family: str) -> None:
    model, tokens = build(family), frame()
    rows, protocols = SUITES["perplexity"](scored(model, model, Windows(tokens, batch=4, device=CPU)))
    ids = [torch.tensor(window, dtype=torch.long)[None] for window in tokens["tokens"]]
    with torch.inference_mode():
        expected = np.array([model(input_ids=x, labels=x).loss.item() for x in ids])
    assert values(rows, "nll_nats_per_token") == pytest.approx(expected, rel=1e-5)
    bits = expected * 19 / math.log(2) / tokens["nbytes"]
    assert values(rows, "bits_per_byte") == pytest.approx(bits.to_numpy(), rel=1e-5)
    assert set(protocols) == {"a/report", "b/report"}
    assert protocols["a/report"].startswith("split=report; window=20; stride=20; non-overlapping; first token unscored")


@EVERY
def test_divergence_is_the_direct_kl(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "CHUNK", 7 * VOCABULARY)  # several chunks, the last one short
    model, reference, tokens = spoilt(family), build(family), frame()
    rows, _ = SUITES["divergence"](scored(model, reference, Windows(tokens, batch=4, device=CPU)))
    for place, window in enumerate(tokens["tokens"]):
        ids = torch.tensor(window[:-1], dtype=torch.long)[None]
        with torch.inference_mode():
            p, q = (m(input_ids=ids).logits[0].double() for m in (reference, model))
        direct = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
        assert values(rows, "kl_nats_per_token")[place] == pytest.approx(direct.item(), rel=1e-4)
        assert values(rows, "top1")[place] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())


def test_a_model_does_not_diverge_from_itself_and_always_from_another() -> None:
    windows = Windows(frame(), batch=4, device=CPU)
    same, _ = SUITES["divergence"](scored(build("llama"), build("llama"), windows))
    other, _ = SUITES["divergence"](scored(spoilt("llama"), build("llama"), windows))
    assert (values(same, "kl_nats_per_token") == 0).all()
    assert (values(same, "top1") == 1).all()
    assert (values(other, "kl_nats_per_token") > 0).all()


def test_one_forward_pass_serves_both_suites() -> None:
    model, windows = build("llama"), Windows(frame(), batch=100, device=CPU)
    both, passes = scored(model, model, windows), []
    model.base_model.register_forward_hook(lambda *_: passes.append(1))
    SUITES["perplexity"](both), SUITES["divergence"](both)
    assert len(passes) == 1


def test_a_stride_of_the_window_changes_nothing_and_a_shorter_one_scores_the_end() -> None:
    model, tokens = build("llama"), frame()
    head = Head(model)

    def scores(stride: int | None) -> pd.DataFrame:
        windows = Windows(tokens, batch=4, device=CPU, stride=stride)
        return windows.scores(head, windows.hidden(model))

    pd.testing.assert_frame_equal(scores(20), scores(None))
    end = scores(8)
    assert (end["tokens"] == 8).all()
    with torch.inference_mode():
        ids = torch.tensor(tokens["tokens"][0], dtype=torch.long)
        direct = F.cross_entropy(model(input_ids=ids[None]).logits[0, -9:-1], ids[-8:])
    assert end["nll"][0] == pytest.approx(direct.item(), rel=1e-5)
    rows, protocols = SUITES["perplexity"](scored(model, model, Windows(tokens, batch=4, device=CPU, stride=8)))
    assert "bits_per_byte" not in set(rows["metric"])  # the bytes of these tokens alone are not known
    assert "stride=8; last 8 tokens scored" in protocols["a/report"]


def test_windows_of_different_lengths_are_padded_harmlessly() -> None:
    model, tokens = build("gpt2"), frame()
    tokens.at[1, "tokens"] = tokens.at[1, "tokens"][:9]
    head, windows = Head(model), Windows(tokens, batch=6, device=CPU)
    alone = Windows(tokens.iloc[[1]], batch=1, device=CPU)
    together = windows.scores(head, windows.hidden(model))
    assert together["tokens"].tolist() == [19, 8, 19, 19, 19, 19]
    assert together["nll"][1] == pytest.approx(alone.scores(head, alone.hidden(model))["nll"][0], rel=1e-5)


def test_no_windows_is_one_line() -> None:
    with pytest.raises(BitallocError, match=r"no token windows.*set retrieve\."):
        Windows(frame().iloc[:0], batch=1, device=CPU)


def test_the_head_must_be_all_there_is_after_the_hidden_states() -> None:
    class Capped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = build("llama")
            self.base_model = self.model.base_model

        def get_output_embeddings(self) -> Any:
            return self.model.get_output_embeddings()

        def get_input_embeddings(self) -> Any:
            return self.model.get_input_embeddings()

        def forward(self, **inputs: Any) -> Any:
            output = self.model(**inputs)
            output.logits = output.logits.tanh()
            return output

    with pytest.raises(BitallocError, match="more than a linear map"):
        Head(Capped())
