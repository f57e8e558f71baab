"""The configuration: in step with its files, strict, and clear about what is wrong."""

from pathlib import Path

import pytest

from bitalloc import config
from bitalloc.errors import BitallocError

ROOT = Path(__file__).parents[1]
FILES = (ROOT / "config/config.yaml", ROOT / "config/models.yaml")
SHEET = (
    "tiny tiny_mamba2 stories260k gpt2_tiny_6 gpt2_tiny_12 gpt2_tiny_24 "
    "gpt2 distilgpt2 gpt2_medium gpt2_large gpt2_xl mamba2_130m opt_125m tinyllama_1_1b llama2_7b mistral_7b "
    "phi_2 qwen2_1_5b qwen2_7b qwen2_72b"
).split()


def test_files_are_in_step_with_the_classes():
    assert FILES[0].read_text() == config.default_yaml()
    assert (ROOT / "config/schema.json").read_text() == config.schema_json()


def test_embedded_defaults_equal_the_class_defaults():
    assert config.load(FILES[0]) == config.Config()


def test_every_model_of_the_sheet_has_a_valid_configuration():
    loaded = config.load(*FILES)
    assert set(SHEET) == set(loaded.models)
    for name in SHEET:
        loaded.for_model(name)


def test_best_spends_more_than_the_defaults_on_every_model():
    usual, best = config.load(*FILES), config.load(*FILES, ROOT / "config/best.yaml")
    for name in SHEET:
        assert "tuned" in best.for_model(name).compress.plans
    usual, best = usual.for_model("gpt2"), best.for_model("gpt2")
    assert best.tune.polish > usual.tune.polish and best.tune.windows > usual.tune.windows
    assert set(best.sweep.bits) > set(usual.sweep.bits)
    assert set(best.sweep.group_sizes) > set(usual.sweep.group_sizes)


def test_every_model_has_the_controls_of_rank_against_bits():
    loaded = config.load(*FILES)
    for name in SHEET:
        assert {"optimal", "bits_only", "rank_only", "uniform"} <= set(loaded.for_model(name).allocate.strategies)


def test_the_72b_is_literally_8400_experiments():
    from bitalloc.families import family
    from bitalloc.option import options

    loaded = config.load(*FILES)
    model = loaded.model("qwen2_72b")
    count = model.blocks * len(family(model.family).roles) * len(options(loaded.for_model("qwen2_72b").sweep))
    assert count == 8400


def test_settings_of_a_model_lie_over_the_configuration():
    loaded = config.load(*FILES, overrides={"seed": 7, "models": {"tiny": {"settings": {"sweep": {"bits": [4]}}}}})
    tiny = loaded.for_model("tiny")
    assert (tiny.seed, tiny.sweep.bits, tiny.sweep.ranks) == (7, [4], [0, 2, 4, 8])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"swep": {}}, ["swep", "did you mean 'sweep'"]),
        ({"sweep": {"bitz": [2]}}, ["sweep.bitz", "did you mean 'bits'"]),
        ({"sweep": {"bits": [7]}}, ["sweep.bits", "2, 3, 4, 5, 6, 8 or 16", "'7'"]),
        ({"models": {"x": {"path": "a", "family": "qwen", "blocks": 1}}}, ["did you mean 'qwen2'"]),
        ({"models": {"x": {"family": "qwen2", "blocks": 1}}}, ["hub", "path"]),
        ({"gates": {"checks": {"beta": {"threshold": 0, "mode": "warn"}}}}, ["why", "reason"]),
        ({"corpora": {"c": {"source": ["a"]}}}, ["corpora.c.source", "did you mean 'sources'"]),
    ],
)
def test_bad_input_is_one_line_with_the_remedy(overrides, words):
    with pytest.raises(BitallocError) as error:
        config.load(*FILES, overrides=overrides)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_bad_settings_of_a_model_are_found_at_that_model():
    loaded = config.load(*FILES, overrides={"models": {"tiny": {"settings": {"sweeep": {}}}}})
    with pytest.raises(BitallocError, match=r"models\.tiny\.settings: unknown key 'sweeep'"):
        loaded.for_model("tiny")


def test_unknown_model_names_the_nearest():
    with pytest.raises(BitallocError, match="did you mean 'qwen2_7b'"):
        config.load(*FILES).model("qwen2_7B")


@pytest.mark.parametrize("text", ["8 GX", "eight", "", "8GB/s"])
def test_unreadable_bytes_are_refused(text):
    with pytest.raises(BitallocError):
        config.parse_bytes(text)


def test_an_unset_variable_expands_to_nothing(monkeypatch):
    monkeypatch.setenv("HERE", "/there")
    monkeypatch.delenv("NOWHERE", raising=False)
    assert config.expand("$HERE/x") == "/there/x"
    assert config.expand("${NOWHERE}/x") is None


def test_broken_yaml_and_absent_files_are_one_line(tmp_path):
    with pytest.raises(BitallocError, match="cannot read the configuration"):
        config.load(tmp_path / "absent.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1\n")
    with pytest.raises(BitallocError, match="not valid YAML"):
        config.load(broken)
