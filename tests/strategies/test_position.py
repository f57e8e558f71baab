"""Rules by position: the places they name, at any depth, and the plans that the pipeline makes of them."""

import json

import pytest

from bitalloc import precision
from bitalloc.config import Rule
from bitalloc.errors import BitallocError
from bitalloc.strategies.position import RULES, kept, position


def names(blocks: int) -> dict[str, tuple]:
    inside = [f"h.{block}.{part}" for block in range(blocks) for part in ("attn", "mlp")]
    return dict.fromkeys(["wte", "wpe", *inside, "ln_f"], ())


def high(rule: str, blocks: int) -> list[str]:
    return [name for name, bits in precision.parse(position(rule, blocks), names(blocks)).items() if bits == "fp16"]


def test_the_configuration_knows_every_rule():
    assert list(RULES) == list(Rule.__args__)


@pytest.mark.parametrize("blocks", [4, 5, 6, 7, 12, 22, 24, 28, 32, 36, 48, 80])
def test_rules_keep_what_they_say_at_any_depth(blocks):
    k = kept(blocks)
    assert k == -(-blocks // 4)
    places = {}
    for rule in ("early", "early_0", "middle", "late"):
        found = high(rule, blocks)
        numbers = [int(name.split(".")[1]) for name in found]
        assert found == [f"h.{block}.mlp" for block in numbers] and len(numbers) == k
        assert numbers == list(range(numbers[0], numbers[0] + k))
        places[rule] = numbers
    assert places["early"][0] == 1 and places["early_0"][0] == 0 and places["late"][-1] == blocks - 1
    middle = places["middle"]
    assert abs((middle[0] + middle[-1]) - (blocks - 1)) <= 1
    assert len({tuple(numbers) for numbers in places.values()}) == 4
    assert high("last", blocks) == [f"h.{blocks - 1}.attn", f"h.{blocks - 1}.mlp"]
    assert high("champion", blocks) == [*high("early", blocks), f"h.{blocks - 1}.attn"]
    assert not high("all_low", blocks) and len(high("all_high", blocks)) == 2 * blocks + 3


def test_precisions_are_free():
    assert position("early", 6, high="bf16", low="int4") == {"default": "int4", "h.1-h.2.mlp": "bf16"}
    json.dumps(position("champion", 12))


@pytest.mark.parametrize(
    ("rule", "blocks", "said"),
    [("earyl", 12, "did you mean 'early'?"), ("early", 3, "4 are needed")],
)
def test_what_cannot_be_placed_is_one_line(rule, blocks, said):
    with pytest.raises(BitallocError, match=said.replace("?", r"\?")):
        position(rule, blocks)
