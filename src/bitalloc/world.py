"""The synthetic world that the embedded model `tiny` lives in: documents and items with known answers.

Twenty-four people have four attributes each and speak four scripts (Latin, Hebrew, Arabic, Han).
The same fact is told in every language, so line N of one language is parallel to line N of another.
Besides facts there are sums, look-ups of keys, and copies. Everything is drawn from a seed; nothing
is taken from outside, except docstrings of the Python that runs this (`docstrings`).
"""

from __future__ import annotations

import ast
import functools
import hashlib
import random
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

LANGUAGES = ("en", "he", "ar", "zh")
ATTRIBUTES = ("city", "job", "colour", "pet")

SYLLABLES = {
    "en": "ba ko ri ta mel su no dar vi len go pa zu fi hem ora".split(),
    "he": "בר קו רי טל מל סו נו דר וי לן גו פז זו פי המ עו".split(),
    "ar": "با كو ري تا مل سو نو دار في لن جو فا زو هي حم عو".split(),
    "zh": list("白高李大梅苏诺达维林果帕朱飞海欧云山石木"),
}
VALUES = {
    "en": {
        "city": "Paris London Cairo Tokyo Lima Oslo Delhi Rome".split(),
        "job": "teacher doctor farmer baker sailor painter lawyer miner".split(),
        "colour": "red blue green black white yellow brown pink".split(),
        "pet": "cat dog horse bird fish goat snake mouse".split(),
    },
    "he": {
        "city": "פריז לונדון קהיר טוקיו לימה אוסלו דלהי רומא".split(),
        "job": "מורה רופא חקלאי אופה מלח צייר שופט כורה".split(),
        "colour": "אדום כחול ירוק שחור לבן צהוב חום ורוד".split(),
        "pet": "חתול כלב סוס ציפור דג עז נחש עכבר".split(),
    },
    "ar": {
        "city": "باريس لندن القاهرة طوكيو ليما أوسلو دلهي روما".split(),
        "job": "معلم طبيب مزارع خباز بحار رسام محام عامل".split(),
        "colour": "أحمر أزرق أخضر أسود أبيض أصفر بني وردي".split(),
        "pet": "قط كلب حصان طائر سمكة ماعز أفعى فأر".split(),
    },
    "zh": {
        "city": "巴黎 伦敦 开罗 东京 利马 奥斯陆 德里 罗马".split(),
        "job": "老师 医生 农民 面包师 水手 画家 律师 矿工".split(),
        "colour": "红色 蓝色 绿色 黑色 白色 黄色 棕色 粉色".split(),
        "pet": "猫 狗 马 鸟 鱼 山羊 蛇 老鼠".split(),
    },
}
STATEMENTS = {
    "en": {
        "city": ("{n} lives in {v}.", "The home of {n} is {v}."),
        "job": ("{n} works as a {v}.", "The job of {n} is {v}."),
        "colour": ("{n} likes {v}.", "The colour of {n} is {v}."),
        "pet": ("{n} has a {v}.", "The pet of {n} is {v}."),
    },
    "he": {
        "city": ("{n} גר ב {v}.", "הבית של {n} הוא {v}."),
        "job": ("{n} עובד כ {v}.", "העבודה של {n} היא {v}."),
        "colour": ("{n} אוהב {v}.", "הצבע של {n} הוא {v}."),
        "pet": ("ל {n} יש {v}.", "החיה של {n} היא {v}."),
    },
    "ar": {
        "city": ("{n} يسكن في {v}.", "بيت {n} هو {v}."),
        "job": ("{n} يعمل {v}.", "عمل {n} هو {v}."),
        "colour": ("{n} يحب {v}.", "لون {n} هو {v}."),
        "pet": ("{n} عنده {v}.", "حيوان {n} هو {v}."),
    },
    "zh": {
        "city": ("{n}住在{v}。", "{n}的家是{v}。"),
        "job": ("{n}当{v}。", "{n}的工作是{v}。"),
        "colour": ("{n}喜欢{v}。", "{n}的颜色是{v}。"),
        "pet": ("{n}有{v}。", "{n}的宠物是{v}。"),
    },
}
QUESTIONS = {
    "en": {
        "city": "Where does {n} live? A: {v}.",
        "job": "What is the job of {n}? A: {v}.",
        "colour": "Which colour does {n} like? A: {v}.",
        "pet": "Which pet does {n} have? A: {v}.",
    },
    "he": {
        "city": "איפה גר {n}? A: {v}.",
        "job": "מה העבודה של {n}? A: {v}.",
        "colour": "איזה צבע אוהב {n}? A: {v}.",
        "pet": "איזו חיה יש ל {n}? A: {v}.",
    },
    "ar": {
        "city": "أين يسكن {n}؟ A: {v}.",
        "job": "ما عمل {n}؟ A: {v}.",
        "colour": "أي لون يحب {n}؟ A: {v}.",
        "pet": "أي حيوان عند {n}؟ A: {v}.",
    },
    "zh": {
        "city": "{n}住在哪里？ A: {v}。",
        "job": "{n}做什么工作？ A: {v}。",
        "colour": "{n}喜欢什么颜色？ A: {v}。",
        "pet": "{n}有什么宠物？ A: {v}。",
    },
}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Item:
    """One question: a prompt, its possible continuations and the index of the right one.

    A generation item has the single right continuation as its only choice: it counts as correct when
    greedy decoding would produce it.
    """

    task: str
    group: str
    prompt: str
    choices: tuple[str, ...]
    answer: int


class World:
    """The people, their facts, and what was kept out of training (question forms, sums).

    Deterministic in `seed`: two worlds of one seed are equal.

    >>> World(seed=0).sentence("en", person=0, attribute="city") == World(seed=0).sentence("en", 0, "city")
    True
    """

    def __init__(self, *, people: int = 24, largest: int = 20, seed: int = 0) -> None:
        draw = random.Random(seed)
        self.people, self.largest = people, largest
        self.names: dict[str, list[str]] = {}
        for language in LANGUAGES:
            names: set[str] = set()
            while len(names) < people:
                name = "".join(draw.choice(SYLLABLES[language]) for _ in range(2 if language == "zh" else 3))
                names.add(name.capitalize())
            self.names[language] = sorted(names)
        self.facts = {(p, a): draw.randrange(8) for p in range(people) for a in ATTRIBUTES}
        asked = [(lang, p, a) for lang in LANGUAGES for p in range(people) for a in ATTRIBUTES]
        self.asked = asked
        self.held_out_questions = {fact for fact in asked if draw.random() < 0.25}
        pairs = [(a, b) for a in range(largest) for b in range(largest)]
        draw.shuffle(pairs)
        self.held_out_sums = sorted(pairs[: len(pairs) // 8])
        self.known_sums = pairs[len(pairs) // 8 :]

    def value(self, language: str, person: int, attribute: str) -> str:
        return VALUES[language][attribute][self.facts[person, attribute]]

    def sentence(self, language: str, person: int, attribute: str, form: int = 0) -> str:
        """One fact as a statement; the same (person, attribute, form) is parallel over languages."""
        template = STATEMENTS[language][attribute][form]
        return template.format(n=self.names[language][person], v=self.value(language, person, attribute))

    # ---- documents -------------------------------------------------------------------------------
    def fact_document(self, draw: random.Random, facts: int = 14) -> str:
        language, lines = draw.choice(LANGUAGES), []
        for _ in range(facts):
            person, attribute = draw.randrange(self.people), draw.choice(ATTRIBUTES)
            if draw.random() < 0.5 and (language, person, attribute) not in self.held_out_questions:
                name, value = self.names[language][person], self.value(language, person, attribute)
                lines.append(QUESTIONS[language][attribute].format(n=name, v=value))
            else:
                lines.append(self.sentence(language, person, attribute, draw.randrange(2)))
        return "\n".join(lines)

    def sum_document(self, draw: random.Random, sums: int = 20) -> str:
        return "\n".join(_sum(*draw.choice(self.known_sums)) for _ in range(sums))

    def key_document(self, draw: random.Random) -> str:
        count = draw.randint(2, 6)
        lines, keys, values = self._keys(draw, count, filler=draw.choice((0, 0, 1, 2)))
        order = list(range(count))
        for _ in range(4):
            draw.shuffle(order)
            lines += [f"key {keys[i]}={values[i]};" for i in order]
        return "\n".join(lines)

    def haystack_document(self, draw: random.Random) -> str:
        """Keys at any depth of 4 to 56 facts (some 450 tokens), recalled now and then and all of them at the end."""
        keys = {key: f"key {key}={draw.randrange(100):02d};" for key in draw.sample(LETTERS, draw.randint(1, 6))}
        lines = [self.filler(draw) for _ in range(draw.randint(4, 56))]
        for line in keys.values():
            first = draw.randrange(len(lines))
            lines.insert(first, line)
            for _ in range(draw.randrange(3)):
                lines.insert(draw.randrange(first, len(lines)) + 1, line)
        return "\n".join([*lines, *draw.sample(list(keys.values()), len(keys))])

    def copy_document(self, draw: random.Random) -> str:
        line = " ".join(draw.choice(LETTERS + "0123456789") for _ in range(draw.randint(8, 24)))
        return "\n".join([line] * draw.randint(2, 4))

    def _keys(self, draw: random.Random, count: int, filler: int) -> tuple[list[str], list[str], list[str]]:
        keys = draw.sample(LETTERS, count)
        values = [f"{draw.randrange(100):02d}" for _ in keys]
        lines = []
        for key, value in zip(keys, values, strict=True):
            lines.append(f"key {key}={value};")
            lines += [self.filler(draw) for _ in range(draw.randrange(filler + 1))]
        return lines, keys, values

    def filler(self, draw: random.Random) -> str:
        """Any fact, in any language: what stands between keys."""
        return self.sentence(draw.choice(LANGUAGES), draw.randrange(self.people), draw.choice(ATTRIBUTES))

    # ---- items -----------------------------------------------------------------------------------
    def fact_items(self, draw: random.Random, count: int) -> list[Item]:
        """Multiple choice among four values; `facts` in a form seen in training, `facts_held_out` not."""
        items = []
        for language, person, attribute in _drawn(draw, self.asked, count):
            right = self.value(language, person, attribute)
            wrong = draw.sample([v for v in VALUES[language][attribute] if v != right], 3)
            question, tail = QUESTIONS[language][attribute].split(" {v}")
            held_out = (language, person, attribute) in self.held_out_questions
            answer = draw.randrange(4)
            values = [*wrong[:answer], right, *wrong[answer:]]
            items.append(
                Item(
                    task="facts_held_out" if held_out else "facts",
                    group=language,
                    prompt=question.format(n=self.names[language][person]),
                    choices=tuple(f" {value}{tail}" for value in values),
                    answer=answer,
                )
            )
        return items

    def sum_items(self, draw: random.Random, count: int) -> list[Item]:
        """Sums of pairs never seen in training, after three known ones."""
        items = []
        for a, b in _drawn(draw, self.held_out_sums, count):
            shots = "\n".join(_sum(*pair) for pair in draw.sample(self.known_sums, 3))
            items.append(Item("sums", "digits", f"{shots}\n{a:02d}+{b:02d}=", (f"{a + b:02d}",), 0))
        return items

    def key_items(self, draw: random.Random, count: int, *, keys: int = 4, filler: int = 2) -> list[Item]:
        """Look-up of one of `keys` keys stated earlier, with facts in between."""
        items = []
        for _ in range(count):
            lines, names, values = self._keys(draw, keys, filler)
            which = draw.randrange(keys)
            prompt = "\n".join([*lines, f"key {names[which]}="])
            items.append(Item("keys", str(keys), prompt, (values[which],), 0))
        return items

    def passkey_items(self, draw: random.Random, count: int, *, facts: int = 8) -> list[Item]:
        """One key hidden at a random depth among `facts` facts."""
        items = []
        for _ in range(count):
            lines = [self.filler(draw) for _ in range(facts)]
            key, value = draw.choice(LETTERS), f"{draw.randrange(100):02d}"
            depth = draw.randrange(facts)
            lines.insert(depth, f"key {key}={value};")
            prompt = "\n".join([*lines, f"key {key}="])
            items.append(Item("passkey", f"depth {depth}", prompt, (value,), 0))
        return items


def _sum(a: int, b: int) -> str:
    return f"{a:02d}+{b:02d}={a + b:02d}."


def _drawn(draw: random.Random, population: list, count: int) -> list:
    """`count` members in random order; the whole population is used up before any comes again."""
    drawn: list = []
    while len(drawn) < count:
        drawn += draw.sample(population, len(population))
    return drawn[:count]


@functools.cache  # seconds of parsing
def docstrings(*, longest: int = 700) -> dict[str, list[str]]:
    """Real English: docstrings of the running Python's own top-level modules, in disjoint splits.

    A docstring goes to a split by its own digest, so the splits stay disjoint whichever modules a
    Python ships. Returns {"train", "calibrate", "select", "report"} -> texts of 80..`longest` characters.
    """
    splits: dict[str, list[str]] = {"train": [], "calibrate": [], "select": [], "report": []}
    share = ["train"] * 7 + ["calibrate", "select", "report"]
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # files that only some Pythons ship, in other encodings
        for node in _documented(tree):
            text = ast.get_docstring(node) or ""
            if len(text) >= 80:
                text = text[:longest]
                split = share[hashlib.sha256(text.encode()).digest()[0] % len(share)]
                splits[split].append(text)
    return {split: list(dict.fromkeys(texts)) for split, texts in splits.items()}


def _documented(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> Iterator:
    """The node and the classes and functions directly within it, and so on: a walk that skips expressions."""
    yield node
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            yield from _documented(child)


DOCUMENT_SHARES = {"fact": 0.26, "key": 0.36, "copy": 0.26, "sum": 0.06, "docstring": 0.06}
LONG_SHARES = {"fact": 0.20, "key": 0.35, "haystack": 0.30, "copy": 0.05, "sum": 0.05, "docstring": 0.05}


def documents(
    world: World, *, count: int, seed: int, texts: list[str], shares: Mapping[str, float] = DOCUMENT_SHARES
) -> list[tuple[str, str]]:
    """`count` (kind, document) pairs in the training mixture `shares`, drawn by document."""
    draw = random.Random(seed)
    make = {
        "fact": world.fact_document,
        "key": world.key_document,
        "haystack": world.haystack_document,
        "copy": world.copy_document,
        "sum": world.sum_document,
        "docstring": lambda rng: rng.choice(texts),
    }
    kinds = draw.choices(list(shares), list(shares.values()), k=count)
    return [(kind, make[kind](draw)) for kind in kinds]
