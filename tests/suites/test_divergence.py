"""The block of llama-perplexity against a plain computation in float64 from whole logits."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from bitalloc.suites import SUITES, Windows, divergence, scoring
from tests.random_models import VOCABULARY, build
from tests.suites.test_windows import CPU, frame, scored, spoilt


@pytest.fixture(scope="module")
def plain() -> dict[str, np.ndarray]:
    """kl, delta_p, nll of plan and reference, same argmax, of every scored token, [windows, tokens]."""
    found: dict[str, list[np.ndarray]] = {}
    model, reference = spoilt("llama"), build("llama")
    for window in frame()["tokens"]:
        ids = torch.tensor(window, dtype=torch.long)[None]
        with torch.inference_mode():
            q, p = (m(input_ids=ids).logits[0, :-1].double().numpy() for m in (model, reference))
        log_q, log_p = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (q, p))
        at = np.arange(len(log_q)), ids[0, 1:].numpy()
        row = {
            "kl": (np.exp(log_p) * (log_p - log_q)).sum(1),
            "delta_p": np.exp(log_q[at]) - np.exp(log_p[at]),
            "nll": -log_q[at],
            "base": -log_p[at],
            "same": (log_q.argmax(1) == log_p.argmax(1)).astype(float),
        }
        for name, values in row.items():
            found.setdefault(name, []).append(values)
    return {name: np.array(values) for name, values in found.items()}


def both(monkeypatch: pytest.MonkeyPatch) -> scoring.Scored:
    monkeypatch.setattr(scoring, "CHUNK", 7 * VOCABULARY)  # several chunks, the last one short
    return scored(spoilt("llama"), build("llama"), Windows(frame(), batch=4, device=CPU))


def test_means_over_windows(plain: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = SUITES["divergence"](both(monkeypatch))
    expected = {
        "kl_nats_per_token": plain["kl"],
        "top1": plain["same"],
        "delta_p": plain["delta_p"],
        "delta_p_squared": plain["delta_p"] ** 2,
        "ln_ppl_ratio": plain["nll"] - plain["base"],
    }
    assert set(rows["metric"]) == set(expected)
    for metric, values in expected.items():
        found = rows.loc[rows["metric"] == metric, "value"].to_numpy()
        assert found == pytest.approx(values.mean(1), rel=1e-4, abs=1e-6)


def test_percentiles_and_errors(plain: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    told = divergence.statistics(both(monkeypatch)).set_index(["task", "metric"])
    assert set(told["n"]) == {3 * 19}
    for corpus, half in (("a", slice(0, 3)), ("b", slice(3, 6))):
        part = {name: values[half].ravel() for name, values in plain.items()}
        n = 3 * 19
        for metric, values in (("kl", part["kl"]), ("delta_p", part["delta_p"])):
            assert told.at[(f"{corpus}/report", f"{metric}_max"), "value"] == pytest.approx(values.max(), abs=2e-6)
            assert told.at[(f"{corpus}/report", f"{metric}_min"), "value"] == pytest.approx(values.min(), abs=2e-6)
            for share in (99.9, 99, 95, 90, 50, 10, 5, 1, 0.1):
                place = share / 100 * (n - 1)  # llama.cpp: linear between the order statistics around it
                below, rest = int(place), place % 1
                ordered = np.sort(values)
                wanted = (1 - rest) * ordered[below] + rest * ordered[min(below + 1, n - 1)]
                found = told.at[(f"{corpus}/report", f"{metric}_p{share:g}"), "value"]
                assert found == pytest.approx(wanted, rel=1e-4, abs=2e-6)

        def error(values: np.ndarray) -> float:
            return float(np.sqrt(((values**2).mean() - values.mean() ** 2) / (len(values) - 1)))

        cov = (part["nll"] * part["base"]).mean() - part["nll"].mean() * part["base"].mean()
        variances = error(part["nll"]) ** 2, error(part["base"]) ** 2
        rms = np.sqrt((part["delta_p"] ** 2).mean())
        wanted = {
            "kl_se": error(part["kl"]),
            "delta_p_se": error(part["delta_p"]),
            "delta_p_rms_se": 0.5 / rms * error(part["delta_p"] ** 2),
            "top1_se": np.sqrt(part["same"].mean() * (1 - part["same"].mean()) / (n - 1)),
            "ln_ppl_ratio_se": np.sqrt(sum(variances) - 2 * cov / (n - 1)),
            "log_prob_correlation": cov / (n - 1) / np.sqrt(variances[0] * variances[1]),
        }
        for metric, value in wanted.items():
            assert told.at[(f"{corpus}/report", metric), "value"] == pytest.approx(value, rel=1e-4), metric


def test_nothing_departs_from_itself() -> None:
    windows = Windows(frame(), batch=4, device=CPU)
    told = divergence.statistics(scored(build("llama"), build("llama"), windows)).set_index("metric")["value"]
    assert told["log_prob_correlation"].tolist() == pytest.approx([1, 1])
    assert (told.drop("log_prob_correlation") == 0).all()


def test_flips_are_counted_between_the_same_items_alone() -> None:
    def acc(plan: str, task: str, values: list[float]) -> pd.DataFrame:
        rows = {"item": range(len(values)), "group": "g", "value": values, "weight": 1.0}
        return pd.DataFrame(rows).assign(plan=plan, suite="world", task=task, metric="acc")

    before = [acc("reference", "a", [1, 1, 0, 0]), acc("reference", "b", [0, 1])]
    rows = pd.concat([*before, acc("p", "a", [1, 0, 0, 1]), acc("p", "b", [1, 1]), acc("q", "a", [1, 1, 0, 0])])
    found = divergence.flips(rows, "reference").groupby(["plan", "task", "metric"])["value"].sum()
    assert found["p", "a"].to_dict() == {"flips": 2, "flips_to_right": 1, "flips_to_wrong": 1}
    assert found["p", "b"].to_dict() == {"flips": 1, "flips_to_right": 1, "flips_to_wrong": 0}
    assert (found["q"] == 0).all()
    assert divergence.flips(rows.assign(metric="margin_nats"), "reference").empty
