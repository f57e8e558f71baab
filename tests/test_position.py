"""Studies by position: verdicts on planted damage, the scripts over a random model, and the command line."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from bitalloc import figures, position, precision, validate
from bitalloc.config import Config, Model, Study, load, read_study
from bitalloc.errors import BitallocError
from bitalloc.position import KL, RATIO, Damage, Measured, criteria, damages
from bitalloc.tables import BACKENDS, CRITERIA, INVENTORY, POSITION, TOKENS
from tests.random_models import CONTEXT, VOCABULARY
from tests.small import Small, small, tokens
from tests.test_figures import drawn

ROOT = Path(__file__).parents[1]
STUDY = Study(title="Planted.", kind="scale", models=["a", "b"], corpora=["home", "away"])
WORTH = {"all_low": 0.0, "early": 0.3, "early_0": 0.3, "middle": 0.1, "late": 0.05, "last": 0.1, "champion": 0.35}


def planted(
    name: str = "a", *, blocks: int = 12, family: str = "gpt2", noise: float = 0.01, worth: dict | None = None
) -> Measured:
    """A model in which all INT8 costs 1 and a rule saves its worth, on every window up to `noise`."""
    rng, rows = np.random.default_rng(len(name)), []
    for corpus in STUDY.corpora:
        shared_I = rng.normal(0, 0.2, 24)  # windows differ far more than the rules do: only pairs tell
        for rule in STUDY.rules:
            damage = 0.0 if rule == "all_high" else 1 - (WORTH | (worth or {}))[rule] + shared_I
            for metric in (KL, RATIO):
                for item, value in enumerate(damage + rng.normal(0, noise, 24)):
                    place = {"plan": rule, "suite": "divergence", "task": f"{corpus}/report", "metric": metric}
                    rows.append(place | {"item": item, "group": corpus, "value": value, "weight": 10.0})
    sheet = Model(path="/nowhere", family=family, blocks=blocks)
    return Measured(name, sheet, pd.DataFrame(rows), dict.fromkeys(STUDY.rules, 100), backends())


def backends(**changes: float | str) -> pd.DataFrame:
    rows = []
    for plan, names in (("all_low", ["native", "torchao_int8"]), ("champion", ["native"])):
        for name in names:
            for corpus in STUDY.corpora:
                numbers = {"loss_nats_per_token": 1e-5, "loss_lo": -1e-4, "loss_hi": 1e-4}
                numbers |= {"speedup": 0.8, "speedup_lo": 0.7, "speedup_hi": 0.9, "status": "measured"} | changes
                rows.append({"plan": plan, "backend": name, "task": f"{corpus}/report"} | numbers)
    return pd.DataFrame(rows, columns=BACKENDS.names)


def verdicts(frame: pd.DataFrame, criterion: str) -> list[str]:
    return frame.loc[frame["criterion"] == criterion, "verdict"].tolist()


def judged(*measured: Measured, study: Study = STUDY, **how: object) -> pd.DataFrame:
    return criteria(study, measured, resamples=300, **how)


def test_damage_is_paired_over_windows():
    damage = Damage(planted().responses, "home", KL, resamples=300, seed=0)
    alone, worth = damage.estimate(early=1), damage.worth(early=1)
    assert worth.value == pytest.approx(0.3, abs=0.02) and worth.lo < 0.3 < worth.hi
    assert worth.hi - worth.lo < 0.2 * (alone.hi - alone.lo)
    twice = damage.worth(early=1, middle=-2)
    assert twice.value == pytest.approx(worth.value - 2 * damage.worth(middle=1).value)


def test_claims_that_hold_are_met_and_the_tables_fulfil_their_schemas(tmp_path):
    measured = [planted("a", blocks=6), planted("bb", blocks=24, family="llama")]
    frame = judged(*measured)
    CRITERIA.write(frame, tmp_path / "criteria.parquet")
    table = damages(STUDY, measured, resamples=300)
    POSITION.write(table, tmp_path / "position.parquet")
    assert len(table) == 2 * 2 * 2 * len(STUDY.rules)
    for criterion in ("early > 2 x middle", "early > 2 x late"):
        assert verdicts(frame, criterion) == ["met"] * 4  # by KL and by perplexity
    for criterion in ("persists with scale", "generalises to other architectures", "holds off home"):
        assert verdicts(frame, criterion) == ["met"]
    assert verdicts(frame, "real INT8 loses nothing (native)") == ["met", "met"]
    assert verdicts(frame, "champion faster than FP16 (native)") == ["not met", "not met"]
    assert "6 to 24 blocks" in frame.set_index("criterion").loc["persists with scale", "why"]
    figures.position(table, frame, STUDY, tmp_path / "a.png")
    drawn(tmp_path / "a.png", 9)
    assert "2 of 2 models" in figures.position.__globals__["sentence"](frame, STUDY)


def test_claims_that_fail_are_not_met_and_what_noise_hides_is_open():
    frame = judged(planted("a"), planted("bb", blocks=24, worth={"early": 0.12}))
    assert verdicts(frame, "early > 2 x middle") == ["met", "met", "not met", "not met"]
    assert verdicts(frame, "persists with scale") == ["not met"]
    assert verdicts(judged(planted(noise=1.0)), "early > 2 x middle") == ["open", "open"]


def test_a_claim_about_several_models_allows_for_their_number():
    """Of six values of which each looks bad by chance one time in forty, one that just does says little."""

    def rows(*values: float) -> list[dict]:
        return [{"value": value, "deviation": 0.45, "df": 23.0, "verdict": "open"} for value in values]

    whole = position._every("holds off home", rows(-1.0, 1.0, 1.0, 1.0, 1.0, 1.0), "", "")
    assert whole["verdict"] == "open" and whole["lo"] < whole["value"] == -1 < 0 < whole["hi"]
    assert position._every("holds off home", rows(-1.0), "", "")["verdict"] == "not met"  # t(.975; 23) .45 = .93
    assert position._every("holds off home", rows(-2.0, 1.0), "", "")["verdict"] == "not met"


def test_early_mlps_that_do_nothing_beside_harmful_middle_ones_meet_nothing():
    frame = judged(planted(worth={"early": -0.05, "middle": -0.3}))
    assert verdicts(frame, "early > 2 x middle") == ["not met", "not met"]


def test_what_cannot_be_judged_is_not_run_with_its_reason():
    alone = judged(planted("a")).set_index("criterion")
    assert alone.loc["persists with scale", ["verdict", "why"]].tolist() == ["not run", "fewer than two depths ran"]
    assert alone.loc["generalises to other architectures", "why"] == "every model that ran is a GPT-2"
    home = judged(planted("a"), study=STUDY.model_copy(update={"corpora": ["home"]})).set_index("criterion")
    assert home.loc["holds off home", ["verdict", "why"]].tolist() == ["not run", "the study has one corpus"]
    without = planted("a")
    without = Measured(without.name, without.sheet, without.responses, without.nbytes, backends().iloc[:0])
    frame = judged(without, study=STUDY.model_copy(update={"low": "int4"})).set_index("criterion")
    assert frame.loc["real INT8 loses nothing", "why"] == "the study's low precision is int4"
    refused = backends(status="torchao quantises nn.Linear", **dict.fromkeys(["loss_hi", "speedup"], np.nan))
    measured = Measured(without.name, without.sheet, without.responses, without.nbytes, refused)
    told = judged(measured, skipped={"c": "hub/c: no network"}).set_index("criterion")
    row = told.loc["real INT8 loses nothing (torchao_int8)"]
    assert row["verdict"] == "not run" and row["why"] == "torchao quantises nn.Linear" and np.isnan(row["value"])
    assert told.loc["every", ["model", "verdict", "why"]].tolist() == ["c", "not run", "hub/c: no network"]


def test_real_int8_is_judged_on_the_worst_corpus():
    bad = backends()
    bad.loc[bad["task"] == "away/report", ["loss_nats_per_token", "loss_lo", "loss_hi"]] = 0.01, 0.005, 0.02
    base = planted("a")
    frame = judged(Measured(base.name, base.sheet, base.responses, base.nbytes, bad)).set_index("criterion")
    row = frame.loc["real INT8 loses nothing (torchao_int8)"]
    assert row["verdict"] == "not met" and row["why"].endswith("on away") and row["n"] == 24


# ---- the scripts, in the order of the workflow -------------------------------------------------------
def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Small:
    """A random Llama of four blocks."""
    folder, shape = tmp_path_factory.mktemp("position"), {"hidden_size": 32, "intermediate_size": 48}
    torch.manual_seed(0)
    given = LlamaConfig(
        vocab_size=VOCABULARY, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=CONTEXT, **shape
    )
    model = AutoModelForCausalLM.from_config(given)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2).add_(1.0 if parameter.dim() == 1 else 0.0)
    model.save_pretrained(folder / "model")
    return small("llama", folder / "small", source=folder / "model")


def test_the_scripts_go_from_a_model_to_verdicts(llama, tmp_path):
    place = {"path": str(llama.path), "family": "llama", "hub": None, "revision": "local"}
    (tmp_path / "checkpoint.json").write_text(json.dumps(place))
    INVENTORY.write(llama.inventory, tmp_path / "inventory.parquet")
    TOKENS.write(tokens(windows=8), tmp_path / "tokens.parquet")
    study = Study(title="Small.", kind="architectures", models=["m"], corpora=["noise"], low="int8")
    settings = Config(
        store=str(tmp_path / "store"), device="cpu", evaluate={"resamples": 100, "batch": 4, "rerun": False}
    )
    inputs = {name: tmp_path / f"{name}.parquet" for name in ("inventory", "tokens")}
    inputs["checkpoint"] = tmp_path / "checkpoint.json"
    outputs = {"scores": tmp_path / "evaluate.parquet", "responses": tmp_path / "responses.parquet"}
    outputs["folder"] = tmp_path / "plans"
    script("position_evaluate")(inputs=inputs, study=study, settings=settings, remote_code=False, outputs=outputs)
    early = json.loads((tmp_path / "plans/early.json").read_text())
    assert early["h.1.mlp"] == "fp16" and early["h.0"] == early["h.2-h.3"] == early["lm_head"] == "int8"
    assert precision.compact(precision.parse(early, precision.components(llama.inventory))) == early
    script("position_backends")(
        rules=["all_low", "champion"], inputs=inputs | {"folder": tmp_path / "plans"}, settings=settings,
        remote_code=False, path_to_table=tmp_path / "backends.parquet",
    )  # fmt: skip
    ran = BACKENDS.read(tmp_path / "backends.parquet").set_index(["plan", "backend"])
    ppl = ran.loc["all_low", "ppl"]
    lost = np.log(ppl["torchao_int8"] / ppl["native"])  # whose codes are those that were simulated
    assert ran.loc[("all_low", "torchao_int8"), "loss_nats_per_token"] == pytest.approx(lost, rel=1e-3, abs=1e-7)
    assert ran.loc[("all_low", "native"), "loss_nats_per_token"] == 0 < ran.loc[("champion", "native"), "speedup_lo"]
    script("position")(
        study=study, sheets={"m": Model(path="/nowhere", family="llama", blocks=4)}, skipped={"n": "n: no such folder"},
        inputs={
            "responses": [outputs["responses"]], "inventories": [inputs["inventory"]], "folders": [tmp_path / "plans"],
            "backends": [tmp_path / "backends.parquet"],
        },
        resamples=100, seed=0, outputs={name: tmp_path / f"s.{name}" for name in ("table", "criteria", "figure")},
    )  # fmt: skip
    table = POSITION.read(tmp_path / "s.table").set_index(["rule", "metric"])
    kl = table.xs(KL, level="metric")["value"]
    assert abs(kl["all_high"]) < 1e-6 < kl["early"] < kl["all_low"]
    nbytes = table.xs(KL, level="metric")["nbytes"]
    assert nbytes["all_low"] < nbytes["early"] == nbytes["late"] == nbytes["middle"] < nbytes["all_high"]
    frame = CRITERIA.read(tmp_path / "s.criteria").set_index("criterion")
    assert frame.loc["real INT8 loses nothing (native)", "verdict"] == "met"
    assert frame.loc["champion faster than FP16 (native)", "value"] > 0
    assert frame.loc["every", "why"] == "n: no such folder"
    drawn(tmp_path / "s.figure", 9)


# ---- commands and files ------------------------------------------------------------------------------
def test_one_command_writes_a_plan_for_any_depth(capsys, monkeypatch):
    assert position.main(["24", "--rule", "champion", "--low", "int4"]) == 0
    assert json.loads(capsys.readouterr().out) == {"default": "int4", "h.1-h.6.mlp": "fp16", "h.23.attn": "fp16"}
    monkeypatch.chdir(ROOT)
    assert position.main(["gpt2_large"]) == 0
    assert json.loads(capsys.readouterr().out) == {"default": "int8", "h.1-h.9.mlp": "fp16"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gtp2"], "unknown model 'gtp2': did you mean 'gpt2'?"),
        (["12", "--rule", "erly"], "unknown rule 'erly': did you mean 'early'?"),
        (["12", "--low", "int9"], "unknown precision 'int9'"),
        (["2"], "4 are needed"),
    ],
)
def test_a_command_that_is_wrong_says_so_in_one_line(capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(ROOT)
    assert position.main(arguments) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_every_study_of_the_project_can_be_read():
    config = load(ROOT / "config/config.yaml", ROOT / "config/models.yaml")
    found = {path.stem: read_study(path, config) for path in (ROOT / "config/studies").glob("*.yaml")}
    assert {"gpt2_scale", "architectures", "tiny_scale", "tiny_architectures"} <= set(found)
    for study in found.values():
        for model in study.models:
            chosen = config.for_study(model, study)
            assert chosen.retrieve.report == study.corpora and not chosen.retrieve.calibrate


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"models": ["gtp2"]}, "unknown model 'gtp2': did you mean 'gpt2'?"),
        ({"corpora": ["wikitxt2"]}, "unknown corpus 'wikitxt2': did you mean 'wikitext2'?"),
        ({"low": "int9"}, "low"),
        ({"rule": ["early"]}, "unknown key 'rule': did you mean 'rules'?"),
    ],
)
def test_a_study_that_is_wrong_is_one_line(tmp_path, change, said):
    good = {"title": "t", "kind": "scale", "models": ["gpt2"], "corpora": ["c4"]}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(good | change))
    with pytest.raises(BitallocError) as error:
        read_study(tmp_path / "s.yaml", load(ROOT / "config/models.yaml"))
    assert said in str(error.value) and "s.yaml" in str(error.value) and "\n" not in str(error.value)


def test_validate_leaves_out_what_the_machine_lacks_and_says_why(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(validate, "_hub_nbytes", lambda model: 10**18)
    assert "GB of memory are needed" in validate.unavailable(Model(hub="a/b", family="gpt2", blocks=12))
    gone = Model(path=str(tmp_path / "gone"), family="gpt2", blocks=12)
    assert validate.unavailable(gone).endswith("gone: no such folder")
    assert not validate.unavailable(Model(path=str(tmp_path), family="gpt2", blocks=12))
    monkeypatch.setattr(validate.subprocess, "run", lambda *_, **__: pytest.fail("nothing can be run here"))
    assert validate.main(["gpt2_scale", "architectures"]) == 0
    out = capsys.readouterr().out
    assert "2 not run" in out and "gpt2_scale" in out and "memory" in out
    assert validate.main(["gtp2_scale"]) == 1
    assert capsys.readouterr().err == "error: unknown study 'gtp2_scale': did you mean 'gpt2_scale'?\n"


def test_validate_runs_the_rest_and_ends_in_one_table(monkeypatch, capsys, tmp_path):
    for part in ("config", "resources"):
        (tmp_path / part).symlink_to(ROOT / part)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(validate, "_hub_nbytes", lambda model: pytest.fail("no model of these is on the hub"))
    asked = []

    class Done:
        returncode = 0

    def run(command, **_):
        asked.append(command)
        folder = tmp_path / "results/studies/tiny_scale"
        folder.mkdir(parents=True)
        CRITERIA.write(judged(planted("a"), planted("bb", blocks=24)), folder / "criteria.parquet")
        return Done

    monkeypatch.setattr(validate.subprocess, "run", run)
    assert validate.main(["tiny_scale", "--", "--cores", "2", "--config", "seed=1"]) == 0
    [command] = asked
    assert command[3:6] == ["results/studies/tiny_scale/criteria.parquet", "--keep-going", "--cores"]
    assert command[command.index("--config") + 1 :] == ["skip={}", "seed=1"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == list(validate.COLUMNS)
    [scale] = [line for line in lines if "persists with scale" in line]
    assert " met " in scale and lines[-1] == "14 met, 2 not met, 1 not run"
