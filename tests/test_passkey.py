"""Passkey: the same items for all, told and asked as the template says, and retention of what was known."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from bitalloc import config, passkey
from bitalloc.errors import BitallocError
from bitalloc.models import load_model
from bitalloc.store import Store
from bitalloc.tables import PASSKEY
from tests import random_models

TOKENIZER = Tokenizer.from_file("resources/tiny/tokenizer.json")
CPU = torch.device("cpu")


@pytest.mark.parametrize(("kind", "lengths"), [("ruler", [96, 400]), ("world", [48, 200])])
def test_prompts_have_exactly_the_length_and_hold_the_number_at_its_depth(kind, lengths):
    settings = config.Passkey(kind=kind, lengths=lengths, depths=3, items=2)
    asked = passkey.items(TOKENIZER, settings, bos=0, seed=0)
    assert len(asked) == 2 * 3 * 2
    assert asked.equals(passkey.items(TOKENIZER, settings, bos=0, seed=0))
    template = passkey.TEMPLATES[kind]
    for row in asked.itertuples():
        assert len(row.prompt) == row.length and row.prompt[0] == 0
        text = TOKENIZER.decode(row.prompt[1:])
        told = text.index(row.value)
        assert TOKENIZER.decode(row.answer) == template.answer.format(value=row.value)
        if row.length == lengths[1]:
            assert abs(told / text.rindex(template.question.split("{")[0]) - row.depth) < 0.2


DIGESTS = {"ruler": (1, "af5217e5"), "world": (1, "86c61a6f")}


def test_the_digest_of_a_template_is_of_every_part_of_it():
    ruler = passkey.TEMPLATES["ruler"]
    parts = vars(ruler) | {"version": 2}
    assert ruler.digest == passkey.Template(**vars(ruler)).digest != passkey.Template(**parts).digest
    # a change of wording or haystack is a new version: change both, and these
    assert {kind: (t.version, t.digest[:8]) for kind, t in passkey.TEMPLATES.items()} == DIGESTS


def test_lengths_beyond_the_context_are_left_out(capsys):
    settings = config.Passkey(kind="world", lengths=[64, 1024])
    assert passkey.fitting(settings, None) == settings
    assert passkey.fitting(settings, 1024).lengths == [64]
    assert "no prompts of [1024]" in capsys.readouterr().err
    with pytest.raises(BitallocError, match="ask for shorter prompts"):
        passkey.fitting(settings, 64)


def test_a_length_without_room_for_a_haystack_is_refused():
    with pytest.raises(BitallocError, match="hold no haystack"):
        passkey.items(TOKENIZER, config.Passkey(kind="ruler", lengths=[32], depths=1, items=1), bos=0, seed=0)


def test_answers_are_those_of_decoding_token_by_token():
    model = random_models.build("mamba2")
    settings = config.Passkey(kind="world", lengths=[40], depths=2, items=2)
    asked = passkey.items(TOKENIZER, settings, bos=0, seed=0)
    asked["prompt"] = [[i % 60 for i in prompt] for prompt in asked["prompt"]]
    asked["answer"] = [[7, 9], [3], [5, 1], [2, 2]]  # of several lengths
    greedy, nll = [], []
    for prompt, answer in zip(asked["prompt"], asked["answer"], strict=True):
        ids = list(prompt)
        for _ in range(2):
            with torch.no_grad():
                ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        greedy.append(ids[-2:])
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        nll.append(-logits.log_softmax(-1)[range(len(answer)), answer].sum().item())
    asked["value"] = [f"{greedy[0]}", "no", f"{greedy[2]}", "no"]
    spoken = SimpleNamespace(decode_batch=lambda rows: [str(row) for row in rows])
    found = passkey.answers(model, asked, spoken, passkey.TEMPLATES["world"], batch=3, device=CPU)
    assert found["right"].tolist() == [1, 0, 1, 0]
    assert np.allclose(found["key_nll_nats"], nll, atol=1e-4)


def test_what_loses_nothing_retains_all_and_a_floor_bears_no_claim(tmp_path: Path, monkeypatch):
    """Of 10 items the reference knows all of the shorter length and none of the longer one."""

    def knows(model, asked, *_, **__):
        right = np.where(asked["length"] == 64, 1.0 if model == "all" else asked["item"] % 2, 0.0)
        return asked[[]].assign(right=right, key_nll_nats=0.5)

    monkeypatch.setattr(passkey, "answers", knows)
    made = []
    models = {name: lambda name=name: made.append(name) or {"w4a4": "half"}.get(name, "all") for name in
              ("reference", "lossless", "w4a4")}  # fmt: skip
    settings = config.Passkey(kind="world", lengths=[64, 96], depths=5, items=2)
    where = {"bos": 0, "seed": 0, "store": Store(tmp_path / "store"), "device": CPU}
    frame = passkey.passkey(models, TOKENIZER, settings, identities={name: name for name in models}, **where)
    PASSKEY.write(frame, tmp_path / "passkey.parquet")
    whole = frame[frame["depth"] == -1].set_index(["scheme", "length"])
    assert whole.loc[("lossless", 64), ["accuracy", "retention", "n_retained", "n"]].tolist() == [1, 1, 10, 10]
    assert whole.loc[("lossless", 64), "retention_lo"] == pytest.approx(0.722, abs=1e-3)  # Wilson, 10 of 10
    assert whole.loc[("w4a4", 64), "retention"] == 0.5
    assert set(whole.xs(96, level="length")["status"]) == {"floor"}
    assert whole.xs(96, level="length")["retention"].isna().all()
    assert made == list(models)
    again = passkey.passkey(models, TOKENIZER, settings, identities={name: name for name in models}, **where)
    assert again.equals(frame) and made == list(models)  # from the store, no model is made


def test_the_embedded_state_space_knows_keys_well_within_its_trained_length():
    model = load_model(Path("resources/tiny_mamba2"), device=CPU)
    template = passkey.TEMPLATES["world"]
    settings = config.Passkey(kind="world", lengths=[256], depths=8, items=1)
    asked = passkey.items(TOKENIZER, settings, bos=0, seed=1)
    found = passkey.answers(model, asked, TOKENIZER, template, batch=8, device=CPU)
    assert found["right"].mean() >= 0.75  # chance: 0.01
