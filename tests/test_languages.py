"""Parallel text, and the embedded model that reads it with layers protected: damage that was planted must be found."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from bitalloc import languages, precision, retrieve
from bitalloc.config import Config
from bitalloc.corpus import load_tokenizer
from bitalloc.errors import BitallocError
from bitalloc.fairness import FAIR, NONE, REFERENCE, Damage, Units, choose, fairness, protected
from bitalloc.families import FAMILIES, family
from bitalloc.languages import Bench, built_in, mapping, read, split, study, tokenise, units
from bitalloc.models import Checkpoint, read_config
from bitalloc.store import Store
from bitalloc.tables import ARMS, SENTENCES, SETS
from bitalloc.world import LANGUAGES
from tests.random_models import save

TINY = Path(__file__).parents[1] / "resources/tiny"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def text() -> pd.DataFrame:
    whole = tokenise(built_in(LANGUAGES), load_tokenizer(TINY), read_config(TINY))
    return split(whole, sentences=40)


@pytest.fixture(scope="module")
def inventory() -> pd.DataFrame:
    return retrieve.inventory("tiny", TINY, family("qwen2"))


def bench(folder: Path, text: pd.DataFrame, inventory: pd.DataFrame, kind: type[Bench] = Bench, **how) -> Bench:
    settings = {"low": "int8", "high": "fp16", "store": Store(folder), "device": CPU, "batch": 64} | how
    return kind("tiny", Checkpoint(TINY, family("qwen2")), inventory, text, **settings)


# ---- text --------------------------------------------------------------------------------------------
def test_the_built_in_text_is_parallel_and_its_splits_share_no_fact(text):
    whole = built_in(["en", "zh"])
    assert whole.groupby("sentence")["language"].apply(list).map(lambda each: each == ["en", "zh"]).all()
    assert whole["sentence"].nunique() == 192
    sides = [set(part["group"]) for _, part in text.groupby("split")]
    assert not set.intersection(*sides)
    assert [len(side) for side in sides] == [10, 10]
    assert set(text.groupby("sentence")["language"].count()) == {4}


def files(folder: Path, **texts: bytes) -> Path:
    for name, content in texts.items():
        (folder / f"{name}.txt").write_bytes(content)
    return folder


def test_files_are_read_line_by_line(tmp_path):
    files(tmp_path, en=b"\xef\xbb\xbfone\r\ntwo\xe2\x80\xa8still two\nthree\n", he="אחת\nשתיים\nשלוש".encode())
    found = read(tmp_path, ["en", "he"])
    assert found.loc[found["language"] == "en", "text"].tolist() == ["one", "two\u2028still two", "three"]
    assert found.loc[found["sentence"] == 2, "text"].tolist() == ["three", "שלוש"]
    assert found["group"].tolist() == [0, 0, 1, 1, 2, 2]
    assert read({"en": tmp_path / "en.txt", "he": tmp_path / "he.txt"}, ["en", "he"]).equals(found)


def test_a_sentence_that_is_there_twice_is_on_one_side(tmp_path):
    numbers = [str(n % 20) for n in range(40)]
    found = split(read(files(tmp_path, en="\n".join(numbers).encode(), he="\n".join(numbers).encode()), ["en", "he"]))
    assert (found.groupby("text")["split"].nunique() == 1).all()
    assert found["split"].value_counts().tolist() == [40, 40]


@pytest.mark.parametrize(
    ("texts", "named", "words"),
    [
        ({"en": b"a\nb\n", "he": b"a\n"}, "en,he", "en.txt has 2 lines, .*he.txt 1: they are not aligned"),
        ({"en": b"a\n\nb\n\n", "he": b"a\nb\nc\nd"}, "en,he", r"en.txt: line 2, 4 is empty"),
        ({"en": b"a\n", "he": b"\xff\n"}, "en,he", r"he.txt is not UTF-8 \(byte 0\)"),
        ({"en": b"a\n", "he": b"a\n"}, "en,hee", "unknown language 'hee' in .*: did you mean 'he'"),
        ({"en": b"a\n", "he": b"a\n"}, "en", "name two or more different languages"),
        ({"en": b"a\n", "he": b"a\n"}, "en,en", "name two or more different languages"),
    ],
)
def test_bad_files_are_one_line(tmp_path, texts, named, words):
    with pytest.raises(BitallocError, match=words) as error:
        read(files(tmp_path, **texts), named.split(","))
    assert "\n" not in str(error.value)


def test_a_folder_that_is_none_and_a_language_that_the_world_lacks(tmp_path):
    with pytest.raises(BitallocError, match="is no folder"):
        read(tmp_path / "absent", ["en", "he"])
    with pytest.raises(BitallocError, match="unknown language 'fr' in the built-in text: valid: ar, en, he, zh"):
        built_in(["en", "fr"])


def whole_words(*known: str) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0} | {word: n for n, word in enumerate(known, 1)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def aligned(count: int, **texts: str) -> pd.DataFrame:
    rows = [(language, n, n, text) for n in range(count) for language, text in texts.items()]
    return pd.DataFrame(rows, columns=["language", "sentence", "group", "text"])


def test_a_tokenizer_that_cannot_spell_a_script_says_which_share_is_lost():
    found = aligned(20, en="one two", he="one שתיים")
    with pytest.raises(BitallocError, match=r"he: the tokenizer maps 62.5% of the characters to unknown tokens"):
        tokenise(found, whole_words("one", "two"), {"bos_token_id": 0})
    # a tokenizer that has no unknown token drops what it does not know
    letters = Tokenizer(models.BPE({"o": 0, "n": 1, "e": 2}, []))
    with pytest.raises(BitallocError, match=r"he: the tokenizer maps 50.0% of the characters"):
        tokenise(aligned(20, en="one", he="oneאחת"), letters, {"bos_token_id": 0})


def test_texts_that_do_not_fit_the_model_are_refused(capsys):
    tokenizer, fine = whole_words("one", "two"), {"bos_token_id": 0, "max_position_embeddings": 32}
    found = tokenise(aligned(20, en="one two", he="two one"), tokenizer, fine)
    assert found["tokens"].iloc[0] == [0, 1, 2]
    assert found["ntokens"].tolist() == [2] * 40
    cases = [
        (aligned(10, en="one two", he="two"), fine, "en: the text has 20 tokens, fewer than one context of 32"),
        (aligned(20, en="one", he="two " * 33), {**fine, "vocab_size": 3}, "en: the text has 20 tokens"),
        (aligned(40, en="one", he="two"), fine | {"vocab_size": 2}, "the tokenizer gives token 2, config.json has 2"),
        (aligned(40, en="one", he="two"), {}, "neither bos_token_id nor eos_token_id"),
    ]
    for text, config, words in cases:
        with pytest.raises(BitallocError, match=words) as error:
            tokenise(text, tokenizer, config)
        assert "\n" not in str(error.value)
    long = aligned(40, en="one", he="two")
    long.loc[(long["language"] == "he") & (long["sentence"] == 7), "text"] = "two " * 32
    kept = tokenise(long, tokenizer, fine)
    assert sorted(set(range(40)) - set(kept["sentence"])) == [7]
    assert "1 of 40 sentences do not fit the context of 32 tokens" in capsys.readouterr().err
    with pytest.raises(BitallocError, match="12 aligned facts or sentences are too few"):
        split(aligned(12, en="one", he="two"))


# ---- units -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FAMILIES)
def test_units_cost_what_their_precision_map_costs(tmp_path, name):
    save(name, tmp_path)
    inventory = retrieve.inventory("m", tmp_path, family(name))
    found, known = units(inventory, "int4", "fp16"), precision.components(inventory)
    for protected_units in ([], ["h.1"], ["h.0", "h.2"], list(found.added)):
        exact = precision.nbytes(inventory, precision.parse(mapping(protected_units, "int4", "fp16"), known))
        assert found.nbytes(protected_units) == exact
    assert found.bits_per_weight(found.nbytes(found.added)) == 16
    assert list(found.added)[-1] != "ln_f"


# ---- the model that reads ------------------------------------------------------------------------------
def test_sentences_are_scored_as_the_model_alone_scores_them(tmp_path, text, inventory):
    from transformers import AutoModelForCausalLM

    own = bench(tmp_path, text, inventory, low="int4")
    found = own.sentences("wte+h.0+h.1+h.2+h.3", "select")  # protected: as stored, in 16 bits
    reference = own.sentences(REFERENCE, "select")
    assert np.allclose(found["nll_nats"], reference["nll_nats"])
    SENTENCES.write(reference, tmp_path / "sentences.parquet")
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    rows = text[text["split"] == "select"].reset_index(drop=True)
    for n in (0, 17, 41):
        ids = torch.tensor([rows.loc[n, "tokens"]])
        with torch.inference_mode():
            nats = model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        assert reference.loc[n, "nll_nats"] == pytest.approx(nats, rel=1e-4)
    rounded = own.sentences(NONE, "select")
    assert (rounded["nll_nats"] - reference["nll_nats"]).abs().max() > 0.01
    # back to the weights of the checkpoint, head included
    fresh = bench(tmp_path / "other", text, inventory, low="int4")
    fresh.sentences(NONE, "select")
    assert np.allclose(fresh.sentences(REFERENCE, "select")["nll_nats"], reference["nll_nats"])


class Planted(Bench):
    """Rounding ruins the rows of the embedding that Hebrew alone uses."""

    def _weight(self, layer, level):
        W_OI = super()._weight(layer, level)
        if level == self.low and layer == "model.embed_tokens":
            ids = {name: set(np.concatenate(part["tokens"].tolist())) for name, part in self.text.groupby("language")}
            own = sorted(ids["he"] - ids["en"] - ids["ar"] - ids["zh"])
            noise = torch.randn(len(own), W_OI.shape[1], generator=torch.Generator().manual_seed(0))
            W_OI[own] += 0.7 * W_OI[own].std() * noise
        return W_OI


@pytest.fixture(scope="module")
def planted(tmp_path_factory, text, inventory):
    """(bench, budget, study): the embedding or one block may be protected."""
    items = retrieve.items(Config(retrieve={"items": {"facts": 24}}), TINY)
    own = bench(tmp_path_factory.mktemp("store"), text, inventory, Planted, items=items)
    budget = own.units.base + max(own.units.added.values())
    return own, budget, study(own, budget, asked=f"{budget}", pairs=3, seeds=4)


def test_damage_to_the_rows_of_one_language_is_found_and_its_layer_recommended(planted):
    own, budget, found = planted
    select, report = Damage.both(found.sentences)
    chosen = choose(select, Units.of(found.sets), budget)
    assert chosen.plan == "wte" == found.arms.set_index("arm").loc[FAIR, "plan"]
    assert chosen.confidence > 0.95
    table = protected(select, own.units, chosen, "x").set_index("unit")
    assert table["frequency"].idxmax() == "wte"
    assert table.loc["wte", "lo"] > 0 > table.loc["h.1", "value"] - 0.05
    of = dict(zip(report.languages, report.relative(NONE)[0], strict=True))
    assert of["he"] > 0.1 > max(of["en"], of["ar"], of["zh"])
    assert max(report.relative("wte")[0]) < 0.05


def test_the_study_carries_all_that_is_needed_without_the_model(planted):
    own, budget, found = planted
    ARMS.write(found.arms, own.store.root / "arms.parquet")
    SETS.write(found.sets, own.store.root / "sets.parquet")
    assert Units.of(SETS.read(own.store.root / "sets.parquet")) == own.units
    pattern = found.arms["arm"] == "pattern"
    nbytes = found.sets.set_index("plan")["nbytes"]
    assert (nbytes.loc[found.arms.loc[~pattern, "plan"]] <= budget).all()
    assert found.arms.loc[pattern, "note"].item().startswith("blocks 0, 9 and 11 of 12")
    assert {"random-00", "random-03", "english", "allocator"} <= set(found.arms["arm"])
    table = fairness(found.sentences, found.sets, found.arms, found.answers).set_index(["arm", "language", "metric"])
    assert table.loc[("random", "all", "worst_rel_over_fair"), "value"] > 0
    assert table.loc[("reference", "he", "acc"), "value"] > 0.5


def test_a_study_that_was_killed_goes_on_and_a_finished_one_asks_no_model(planted, text, inventory, monkeypatch):
    own, budget, found = planted
    monkeypatch.setattr(languages, "load_model", None)  # would raise if anything were missing
    again = Planted("tiny", own.checkpoint, inventory, text, low="int8", high="fp16", store=own.store, device=CPU,
                    batch=64, items=own.items)  # fmt: skip
    repeated = study(again, budget, asked=f"{budget}", pairs=3, seeds=4)
    pd.testing.assert_frame_equal(repeated.sentences, found.sentences)
    pd.testing.assert_frame_equal(repeated.arms, found.arms)


def test_scores_that_are_not_finite_are_one_line(tmp_path, text, inventory):
    class Broken(Bench):
        def _weight(self, layer, level):
            return super()._weight(layer, level) * (float("nan") if level == self.low else 1)

    with pytest.raises(BitallocError, match="protecting none leaves NaN or Inf in the scores"):
        bench(tmp_path, text, inventory, Broken).sentences(NONE, "select")


def test_items_that_can_be_asked_are_multiple_choice_in_a_language_of_the_text():
    text = pd.DataFrame({"language": ["en", "he"]})
    items = pd.DataFrame(
        {"item": range(4), "group": ["en", "he", "depth 1", "en"], "choices": [[1, 2], [1, 2], [1, 2], [1]]}
    )
    assert list(languages.spoken(items, text)["item"]) == [0, 1]
    assert languages.spoken(items.iloc[:0], text).empty
    nothing = pd.DataFrame(columns=["task", "item", "group", "choices"], dtype=object)
    assert languages.spoken(nothing, text).empty
