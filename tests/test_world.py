"""The synthetic world: seeded, parallel over languages, honest about what was held out."""

import random

from bitalloc import world
from bitalloc.world import ATTRIBUTES, LANGUAGES, World


def test_two_worlds_of_one_seed_are_equal_and_of_two_are_not():
    assert World(seed=3).facts == World(seed=3).facts
    assert World(seed=3).facts != World(seed=4).facts
    texts = world.docstrings()["train"]
    assert world.documents(World(), count=20, seed=1, texts=texts) == world.documents(
        World(), count=20, seed=1, texts=texts
    )


def test_sentences_are_parallel_over_languages():
    here = World()
    for person in range(here.people):
        for attribute in ATTRIBUTES:
            indices = {world.VALUES[lang][attribute].index(here.value(lang, person, attribute)) for lang in LANGUAGES}
            assert len(indices) == 1


def test_held_out_questions_never_occur_in_documents():
    here, draw = World(), random.Random(0)
    seen = "\n".join(here.fact_document(draw) for _ in range(3000)).splitlines()
    for language, person, attribute in here.held_out_questions:
        name, value = here.names[language][person], here.value(language, person, attribute)
        assert world.QUESTIONS[language][attribute].format(n=name, v=value) not in seen


def test_held_out_sums_never_occur_in_documents():
    here, draw = World(), random.Random(0)
    seen = set("\n".join(here.sum_document(draw) for _ in range(300)).splitlines())
    assert not seen & {f"{a:02d}+{b:02d}={a + b:02d}." for a, b in here.held_out_sums}
    assert len(seen) > 300


def test_items_hold_their_answers():
    here, draw = World(), random.Random(0)
    for item in here.fact_items(draw, 300):
        assert len(set(item.choices)) == 4
    answers = [item.answer for item in here.fact_items(draw, 300)]
    assert {answers.count(i) > 40 for i in range(4)} == {True}  # no position is favoured
    for item in here.key_items(draw, 50) + here.passkey_items(draw, 50):
        key = item.prompt.splitlines()[-1]
        assert f"{key}{item.choices[0]};" in item.prompt


def test_a_haystack_recalls_at_its_end_what_it_told():
    here, draw = World(), random.Random(0)
    for _ in range(50):
        lines = here.haystack_document(draw).splitlines()
        keys = {line for line in lines if line.startswith("key ")}
        assert set(lines[-len(keys) :]) == keys
        assert all(lines.index(key) < len(lines) - len(keys) for key in keys)


def test_docstring_splits_are_disjoint():
    splits = world.docstrings()
    texts = [text for split in splits.values() for text in split]
    assert len(texts) == len(set(texts)) > 500
    assert all(len(splits[name]) > 30 for name in splits)
