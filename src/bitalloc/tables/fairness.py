"""What each language pays: parallel text, its NLL sentence by sentence, and whom a set of layers protects."""

from bitalloc.tables.schema import BOOL, FLOAT, INT, INTERVAL, INTS, LAYER, MODEL, STR, Column, Table

LANGUAGES = Table(
    "languages",
    "What a unit of relative error in one matrix costs each language, on the select half of the parallel text.",
    ("model", "layer", "language"),
    (
        MODEL,
        LAYER,
        Column("language", STR, "as its text is named, e.g. he"),
        Column("signal", STR, "as in SENSITIVITY"),
        Column("coefficient", FLOAT, "nats a token of this language for each unit of rel_error"),
        Column("reference_nll_nats_per_token", FLOAT, "what the reference needs for this language"),
        Column("floor", BOOL, "the reference is no better than a byte-unigram model: no plan is judged by it"),
    ),
)
PARALLEL = Table(
    "parallel",
    "Aligned sentences as a model reads them: each by itself, from a beginning-of-text token on.",
    ("language", "sentence"),
    (
        Column("language", STR, "as its file is named, e.g. he"),
        Column("sentence", INT, "the same sentence has one number in every language"),
        Column("group", INT, "sentences of one group share a fact; whole groups are split and resampled"),
        Column("split", STR, "select or report; they share no group"),
        Column("tokens", INTS, "the beginning, then the sentence"),
        Column("ntokens", INT, "tokens of the sentence, all of them scored"),
        Column("nbytes", INT, "UTF-8 bytes of the sentence"),
        Column("nchars", INT, "characters of the sentence"),
        Column("unigram_nats", FLOAT, "nats under the byte frequencies of the language's select split"),
    ),
)
SENTENCES = Table(
    "sentences",
    "Every aligned sentence in every language under every plan that was read: what fairness is computed from.",
    ("plan", "language", "sentence"),
    (
        MODEL,
        Column("plan", STR, "reference, none, or the units that are protected, joined by +"),
        Column("language", STR, "as its file is named, e.g. he"),
        Column("sentence", INT, "the same sentence has one number in every language"),
        Column("group", INT, "sentences of one group share a fact; whole groups are split and resampled"),
        Column("split", STR, "select or report; they share no group"),
        Column("nll_nats", FLOAT, "negative log-likelihood of the whole sentence, nats"),
        Column("ntokens", INT, "tokens of the sentence, all of them scored"),
        Column("nbytes", INT, "UTF-8 bytes of the sentence"),
        Column("nchars", INT, "characters of the sentence"),
        Column("unigram_nats", FLOAT, "nats under the byte frequencies of the language's select split"),
    ),
)
SETS = Table(
    "sets",
    "Every set of protected units that was read, and its bytes.",
    ("plan",),
    (
        MODEL,
        Column("plan", STR, "none, or the units that are protected, joined by +"),
        Column("size", INT, "how many units"),
        Column("low", STR, "precision of what is not protected, e.g. int4"),
        Column("high", STR, "precision of what is, e.g. fp16"),
        Column("nbytes", INT, "bytes of all tensors, scales included, a tied head once"),
        Column("matrices_nbytes", INT, "of them those of the matrices that may be rounded, embeddings and head too"),
        Column("weights", INT, "weights of these matrices"),
    ),
)
ARMS = Table(
    "arms",
    "What is compared at one budget: the fair set, and what else could be protected.",
    ("budget", "arm"),
    (
        MODEL,
        Column("budget", STR, "as it was asked for"),
        Column("budget_nbytes", INT, "bytes of the whole checkpoint"),
        Column("arm", STR, "none, fair, english, allocator, pattern, or random-<seed>"),
        Column("plan", STR, "the set: a row of SETS"),
        Column("confidence", FLOAT, "share of resamples of the select split in which this set wins", nullable=True),
        Column("note", STR, "how it came about"),
    ),
)
ANSWERS = Table(
    "answers",
    "Multiple-choice items by language: which of them every arm answers rightly.",
    ("plan", "language", "item"),
    (
        Column("plan", STR, "reference, or a row of SETS"),
        Column("language", STR, "language of the question"),
        Column("item", STR, "task and number"),
        Column("acc", FLOAT, "1 = right"),
    ),
)
PROTECTED = Table(
    "protected",
    "Every unit that can be protected: what it costs, what it saves alone, and how often it is selected.",
    ("budget", "unit"),
    (
        MODEL,
        Column("budget", STR, "as it was asked for"),
        Column("unit", STR, "block, embedding or head, with GPT-2's short names"),
        Column("nbytes", INT, "bytes that protecting it adds"),
        Column("chosen", BOOL, "it is in the fair set"),
        Column("frequency", FLOAT, "share of resamples of the select split whose best set holds it"),
        *INTERVAL,
    ),
)
SYNERGY = Table(
    "synergy",
    "Pairs of units: what protecting both removes of worst_rel beyond the sum of each alone, on the select split.",
    ("first", "second"),
    (
        MODEL,
        Column("first", STR, "unit"),
        Column("second", STR, "unit"),
        Column("worst_rel", FLOAT, "worst relative damage with both protected"),
        *INTERVAL,
    ),
)
FAIRNESS = Table(
    "fairness",
    "What every arm does to every language, on the report split.",
    ("budget", "arm", "split", "language", "metric"),
    (
        MODEL,
        Column("budget", STR, "as it was asked for"),
        Column("arm", STR, "reference, or as in ARMS; random: the mean over its seeds"),
        Column("plan", STR, "the set that is protected; empty for a mean"),
        Column("nbytes", FLOAT, "bytes of the whole checkpoint; missing for the reference", nullable=True),
        Column("split", STR, "report, or items"),
        Column("language", STR, "language, or `all` that are ranked"),
        Column("metric", STR, "damage_nats, damage_rel, delta_ppl ..: src/bitalloc/fairness.py has the formulas"),
        *INTERVAL,
        Column("status", STR, "ok; floor: no better than byte unigrams, not ranked; or why there is no value"),
    ),
)
