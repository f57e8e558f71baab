"""Golden numbers of the embedded model: a change that moves them says so in the changelog.

All texts come from the synthetic world, so the numbers do not depend on the docstrings of the Python at hand.
Tolerances cover other CPUs and thread counts, nothing more.
"""

from pathlib import Path

import pytest
import torch

from bitalloc import config, retrieve
from bitalloc.calibrate import calibrate
from bitalloc.evaluate import evaluate
from bitalloc.experiments import Experiments
from bitalloc.families import family
from bitalloc.models import Checkpoint
from bitalloc.option import Option
from bitalloc.store import Store

TINY = Path(__file__).parents[1] / "resources/tiny"
REL_ERROR = {  # at 2 bits; at 3 bits; at 3 bits and rank 4; group 64 throughout
    "model.layers.0.self_attn.q_proj": (0.01169, 0.002283, 0.001605),
    "model.layers.3.mlp.down_proj": (0.005580, 0.001195, 0.0008929),
}
NLL_NATS_PER_TOKEN, NLL_3_BITS, KL_3_BITS = 1.2012, 1.2442, 0.0290
ACCURACY = {"facts": 1.0, "facts_held_out": 0.9375, "sums": 0.98, "keys": 1.0}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Moments, experiments and settings of tiny on a small part of the world."""
    settings = config.parse(
        {
            "device": "cpu",
            "retrieve": {
                **{split: ["world"] for split in ("calibrate", "select", "report")},
                "window": 256,
                "calibrate_windows": 16,
                "select_windows": 1,
                "report_windows": 12,
                "items": {"facts": 64, "sums": 50, "keys": 32},
            },
            "sweep": {"bits": [2, 3], "group_sizes": [64], "ranks": [0, 4]},
            "evaluate": {"suites": ["perplexity", "divergence", "world"], "resamples": 50},
        }
    )
    store, device = Store(tmp_path_factory.mktemp("store")), torch.device("cpu")
    inventory = retrieve.inventory("tiny", TINY, family("qwen2"))
    tokens = retrieve.tokens(settings, TINY)
    moments = calibrate(
        path=TINY, family=family("qwen2"), tokens=tokens, inventory=inventory, settings=settings.calibrate,
        store=store, device=device,
    )  # fmt: skip
    experiments = Experiments(
        checkpoint=Checkpoint(TINY, family("qwen2")), inventory=inventory, moments=moments, store=store,
        sweep=settings.sweep, device=device,
    )  # fmt: skip
    return settings, tokens, inventory, experiments


def test_relative_errors(chain):
    *_, experiments = chain
    options = [Option("gptq", 2, 64, 0), Option("gptq", 3, 64, 0), Option("gptq", 3, 64, 4)]
    for layer, golden in REL_ERROR.items():
        found = experiments.rows([layer], options)["rel_error"].tolist()
        assert found == pytest.approx(golden, rel=0.02), (layer, found)


def test_scores_of_the_reference_and_of_uniform_3_bits(chain):
    settings, tokens, inventory, experiments = chain
    option = Option("gptq", 3, 64, 0)
    claimed = inventory[inventory["claimed"]]
    plan = claimed[["layer", "block", "role"]].assign(
        **{name: getattr(option, name) for name in ("quantizer", "bits", "group_size", "rank")}
    )
    plan = plan.assign(
        nbytes=[option.nbytes(row.rows, row.columns) for row in claimed.itertuples()], cost_nats_per_token=0.0
    ).reset_index(drop=True)
    scores, _ = evaluate(
        plans={"uniform": plan}, experiments=experiments, tokens=tokens,
        items=retrieve.items(settings, TINY), split="report", settings=settings.evaluate,
    )  # fmt: skip
    value = scores.set_index(["plan", "task", "metric"])["value"]
    assert value["reference", "world/report", "nll_nats_per_token"] == pytest.approx(NLL_NATS_PER_TOKEN, rel=1e-3)
    assert value["uniform", "world/report", "nll_nats_per_token"] == pytest.approx(NLL_3_BITS, rel=0.01)
    assert value["uniform", "world/report", "kl_nats_per_token"] == pytest.approx(KL_3_BITS, rel=0.1)
    for task, golden in ACCURACY.items():
        assert value["reference", task, "acc"] == pytest.approx(golden, abs=0.021), task
