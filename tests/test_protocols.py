"""Each protocol against its reference: lm-eval's own code where it is installed, plain loops everywhere."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from bitalloc import evaluate, protocols, tables
from bitalloc.config import Config, parse
from bitalloc.corpus import load_tokenizer
from bitalloc.errors import BitallocError
from bitalloc.models import load_model
from bitalloc.suites import SUITES, Head, Scored, Windows

TINY = Path(__file__).parents[1] / "resources" / "tiny"
CPU = torch.device("cpu")
CONTEXT = 1024  # of tiny
WORDS = "the cat sat on a mat and read the paper about sums and keys".split()
ITEMS = pd.DataFrame(columns=["task", "item", "group", "prompt", "choices", "answer", "chance"])


def prose(words: int, seed: int) -> str:
    draw = np.random.default_rng(seed)
    return " ".join(f"{word}{index}" for index, word in enumerate(draw.choice(WORDS, words))) + " é."


DOCUMENTS = [prose(30, 0), prose(700, 1), prose(5, 2), prose(120, 3)]  # the second is longer than the context


@pytest.fixture(scope="module", params=["no bos", "bos"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny, and tiny with a tokenizer that puts bos first, as Llama's does."""
    if request.param == "no bos":
        return TINY
    path = copytree(TINY, tmp_path_factory.mktemp("bos") / "tiny")
    raw = json.loads((path / "tokenizer.json").read_text())
    raw["post_processor"]["single"].insert(0, {"SpecialToken": {"id": "<eos>", "type_id": 0}})
    raw["post_processor"]["special_tokens"] = {"<eos>": {"id": "<eos>", "ids": [0], "tokens": ["<eos>"]}}
    (path / "tokenizer.json").write_text(json.dumps(raw))
    return path


def configured(file: Path, names: list[str], **evaluate: Any) -> Config:
    corpora = {"texts": {"sources": [str(file)]}}
    return parse({"corpora": corpora, "evaluate": {"protocols": names, "texts": ["texts"], **evaluate}})


def scores(folder: Path, config: Config) -> tuple[pd.Series, pd.DataFrame]:
    """EVALUATE values of the reference by (task, metric), and the readings behind them."""
    readings = protocols.readings(config, folder)
    model = load_model(folder, device=CPU)
    windows = Windows(readings.assign(split="whole"), batch=2, device=CPU)
    rows, how = SUITES["protocols"](Scored(model, Head(model), windows, ITEMS))
    told = {("reference", "protocols", task): protocol for task, protocol in how.items()}
    frame = evaluate.summarise(rows.assign(plan="reference"), told, resamples=50, seed=0)
    assert (frame["lo"] <= frame["value"]).all() and (frame["value"] <= frame["hi"]).all()
    return frame.set_index(["task", "metric"])["value"], readings


def log_probs(model: Any, ids: list[int]) -> np.ndarray:
    """log p of the next token after every position, [T, V], in float64."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1).numpy()


def written(tmp_path: Path, documents: list[str] = DOCUMENTS) -> Path:
    file = tmp_path / "texts.json"
    file.write_text(json.dumps(documents))
    return file


# ---- lm-eval -----------------------------------------------------------------------------------------
def test_lm_eval_by_plain_loops(folder: Path, tmp_path: Path) -> None:
    found, readings = scores(folder, configured(written(tmp_path), ["lm-eval"]))
    model, tokenizer = load_model(folder, device=CPU), load_tokenizer(folder)
    nats = []
    for text in DOCUMENTS:
        ids, total = tokenizer.encode(text).ids, 0.0
        begun = [0, *ids]  # <eos> is also bos
        for first in range(0, len(ids), CONTEXT):
            last = min(first + CONTEXT, len(ids))
            context = begun[max(0, last - CONTEXT) : last]
            log_p = log_probs(model, context)
            for place in range(first, last):
                total -= log_p[len(context) - (last - place), ids[place]]
        nats.append(total)
    words = sum(len(re.split(r"\s+", text)) for text in DOCUMENTS)
    nbytes = sum(len(text.encode()) for text in DOCUMENTS)
    assert len(readings) > len(DOCUMENTS)  # one of them was read in pieces
    assert found["texts/lm-eval", "word_perplexity"] == pytest.approx(math.exp(sum(nats) / words), rel=1e-5)
    assert found["texts/lm-eval", "byte_perplexity"] == pytest.approx(math.exp(sum(nats) / nbytes), rel=1e-5)
    assert found["texts/lm-eval", "bits_per_byte"] == pytest.approx(sum(nats) / nbytes / math.log(2), rel=1e-5)


def rolling(folder: Path, documents: list[str]) -> list[float]:
    """lm-eval's own rolling log-likelihoods."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="lm_eval is not installed")
    from lm_eval.api.instance import Instance
    from transformers import AutoTokenizer

    model = load_model(folder, device=CPU)
    lm = huggingface.HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), device="cpu")
    ask = [Instance("loglikelihood_rolling", {}, (text,), index) for index, text in enumerate(documents)]
    return lm.loglikelihood_rolling(ask, disable_tqdm=True)


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_itself_says_the_same(folder: Path, tmp_path: Path) -> None:
    log_likelihoods = rolling(folder, DOCUMENTS)
    found, _ = scores(folder, configured(written(tmp_path), ["lm-eval"]))
    words = sum(len(re.split(r"\s+", text)) for text in DOCUMENTS)
    nbytes = sum(len(text.encode()) for text in DOCUMENTS)
    total = -sum(log_likelihoods)
    assert found["texts/lm-eval", "word_perplexity"] == pytest.approx(math.exp(total / words), rel=1e-4)
    assert found["texts/lm-eval", "byte_perplexity"] == pytest.approx(math.exp(total / nbytes), rel=1e-4)
    assert found["texts/lm-eval", "bits_per_byte"] == pytest.approx(total / nbytes / math.log(2), rel=1e-4)


# ---- gptq --------------------------------------------------------------------------------------------
def test_gptq_is_the_loss_of_transformers_over_windows(folder: Path, tmp_path: Path) -> None:
    found, readings = scores(folder, configured(written(tmp_path), ["gptq"]))
    model = load_model(folder, device=CPU)
    text = "\n\n".join(DOCUMENTS)
    ids = load_tokenizer(folder).encode(text).ids
    losses = []
    for start in range(0, len(ids) // CONTEXT * CONTEXT, CONTEXT):
        x = torch.tensor([ids[start : start + CONTEXT]])
        with torch.inference_mode():
            losses.append(model(input_ids=x, labels=x).loss.item())
    assert len(losses) == len(readings) > 1
    assert found["texts/gptq", "ppl"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert found["texts/gptq", "median_nll"] == pytest.approx(np.median(losses), rel=1e-5)
    covered = load_tokenizer(folder).decode(ids[1:CONTEXT]).encode()
    assert abs(readings["nbytes"][0] - len(covered)) <= 3  # a character may be cut at the end


# ---- llama.cpp ---------------------------------------------------------------------------------------
def test_llama_cpp_by_plain_loops(folder: Path, tmp_path: Path) -> None:
    found, readings = scores(folder, configured(written(tmp_path), ["llama.cpp"]))
    model = load_model(folder, device=CPU)
    ids = load_tokenizer(folder).encode("\n\n".join(DOCUMENTS)).ids
    adds_bos, nll, count = folder != TINY, 0.0, 0
    for chunk in range(len(ids) // 512):
        tokens = ids[512 * chunk : 512 * (chunk + 1)]
        log_p = log_probs(model, [0, *tokens[1:]] if adds_bos else tokens)
        for j in range(256, 511):
            nll -= log_p[j, tokens[j + 1]]
            count += 1
    assert count == readings["scored"].sum() == 255 * len(readings)
    assert found["texts/llama.cpp", "ppl"] == pytest.approx(math.exp(nll / count), rel=1e-5)


# ---- texts -------------------------------------------------------------------------------------------
def test_the_hubs_lines_and_the_file_are_one_text(tmp_path: Path) -> None:
    file = " \n = One = \n \n Some text , here . \n \n = = Part = = \n \n More . \n \n = Two = \n \n Last ; text \n"
    lines = [line + "\n" if line.strip() else "" for line in file.split("\n")[:-1]]
    whole, rows = protocols.wikitext([file]), protocols.wikitext(lines)
    assert whole == rows
    assert whole.file.lstrip() == file.lstrip()
    assert [counted for _, counted in whole.documents] == [
        " = One = \n \n Some text , here . \n \n = = Part = = \n \n More . \n ",
        " = Two = \n \n Last ; text \n",
    ]
    first = protocols.wikitext([file], 1)
    assert len(first.documents) == 1 and "Two" not in first.file + first.joined
    config = parse({"corpora": {"w": {"sources": [f"{tmp_path}/w.txt"], "kind": "wikitext", "separator": ""}}})
    (tmp_path / "w.txt").write_text(file)
    assert protocols._text(config, "w") == (whole, "whole text")


def test_limits_are_kept_and_told(tmp_path: Path) -> None:
    file = written(tmp_path)

    def read(**limits: Any) -> pd.DataFrame:
        return protocols.readings(configured(file, list(protocols.PROTOCOLS), **limits), TINY)

    whole, two, few = read(), read(documents=2), read(tokens=1100)
    tables.READINGS.write(whole, tmp_path / "readings.parquet")
    assert whole["how"].str.endswith("; whole text").all()
    assert two["how"].str.endswith("; at most 2 documents").all() and few["how"].str.endswith("1100 tokens").all()
    assert two.loc[two["protocol"] == "lm-eval", "document"].unique().tolist() == [0, 1]
    assert few.groupby("protocol")["window"].count().to_dict() == {"gptq": 1, "lm-eval": 1, "llama.cpp": 2}
    for protocol, part in whole.groupby("protocol"):
        assert part["how"].str.startswith(f"{protocol}: ").all()
    scored = whole[whole["protocol"] == "lm-eval"].groupby("document")["scored"].sum()
    assert scored.tolist() == [len(load_tokenizer(TINY).encode(text).ids) for text in DOCUMENTS]


def test_what_the_workflow_has_seen_of_a_text_is_told(tmp_path: Path) -> None:
    seen = {"retrieve": {"calibrate": ["texts"], "select": ["world"]}}
    config = configured(written(tmp_path), ["gptq"])
    both = parse(config.model_dump(mode="json") | seen)
    assert protocols.readings(both, TINY)["how"].str.endswith("whole text; windows of it also serve calibrate").all()
    split = parse(seen | {"evaluate": {"protocols": ["lm-eval"], "texts": ["world"], "documents": 3}})
    assert protocols.readings(split, TINY)["how"].str.endswith("; at most 3 documents").all()


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    def read(**evaluate: Any) -> pd.DataFrame:
        return protocols.readings(parse({"evaluate": {"protocols": ["gptq"]} | evaluate}), TINY)

    assert read(protocols=[]).empty
    with pytest.raises(BitallocError, match=r"unknown corpus 'wold' in evaluate\.texts: did you mean 'world'"):
        read(texts=["wold"])
    with pytest.raises(BitallocError, match=r"corpus world has no end: set evaluate\.documents"):
        read(texts=["world"])
    with pytest.raises(BitallocError, match="corpus world is too short for the protocol gptq"):
        read(texts=["world"], documents=1)
    with pytest.raises(BitallocError, match=r"evaluate\.protocols"):
        read(protocols=["llama"])
    reader = protocols.Reader(load_tokenizer(TINY), 0, 256)
    with pytest.raises(BitallocError, match=r"llama\.cpp reads 512 tokens at a time, the model takes 256"):
        list(protocols.llama_cpp(protocols.plain(DOCUMENTS, "\n"), reader))
    windows = Windows(pd.DataFrame([{"split": "s", "corpus": "c", "tokens": [1, 2]}]), batch=1, device=CPU)
    with pytest.raises(BitallocError, match=r"name them in evaluate\.protocols, not in suites"):
        SUITES["protocols"](Scored(None, None, windows, ITEMS))  # type: ignore[arg-type]


def test_prefix_token_is_the_tokenizers(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TINY)
    (tmp_path / "config.json").write_text('{"bos_token_id": 7, "eos_token_id": 8}')
    assert protocols.prefix_token(tmp_path, tokenizer) == 7
    other = tokenizer.id_to_token(5)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "eos_token": {"content": other}}))
    assert protocols.prefix_token(tmp_path, tokenizer) == 5
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<eos>", "eos_token": other}))
    assert protocols.prefix_token(tmp_path, tokenizer) == 0


# ---- real data ---------------------------------------------------------------------------------------
data = pytest.mark.skipif("BITALLOC_DATA" not in os.environ, reason="BITALLOC_DATA is not set")


@data
@pytest.mark.data
@pytest.mark.filterwarnings("ignore")
def test_wikitext_as_lm_evals_task_has_it() -> None:
    task = pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext", reason="lm_eval is not installed")
    folder = Path(os.environ["BITALLOC_DATA"])
    text = protocols.wikitext([(folder / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8")])
    assert len(text.documents) == 62
    assert all(task.wikitext_detokenizer({"page": counted}) == scored for scored, counted in text.documents)
    path = folder / "models" / "stories260K" / "hf"
    config = parse({"evaluate": {"protocols": ["lm-eval"], "documents": 2}})
    found, _ = scores(path, config)
    log_likelihoods = rolling(path, [scored for scored, _ in text.documents[:2]])
    metrics = [
        task.process_results({"page": counted}, [log_likelihood])
        for (_, counted), log_likelihood in zip(text.documents, log_likelihoods, strict=False)
    ]
    for metric, function in (("word_perplexity", math.exp), ("byte_perplexity", math.exp)):
        total, weight = map(sum, zip(*(each[metric] for each in metrics), strict=True))
        assert found["wikitext2/lm-eval", metric] == pytest.approx(function(-total / weight), rel=1e-4)
    total, weight = map(sum, zip(*(each["bits_per_byte"] for each in metrics), strict=True))
    assert found["wikitext2/lm-eval", "bits_per_byte"] == pytest.approx(-total / weight / math.log(2), rel=1e-4)
