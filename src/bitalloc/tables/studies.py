"""Studies beside the chain: evolution, schemes of weights and activations, position, long contexts and the state."""

from bitalloc.tables.schema import BOOL, FLOAT, INT, INTERVAL, MODEL, STR, Column, Table, estimate

EVOLUTION = Table(
    "evolution",
    "The champion of every generation of the evolutionary search, by seed.",
    ("seed", "generation"),
    (
        Column("seed", INT, "of the search"),
        Column("generation", INT, "0 is the start"),
        Column("champion", STR, "its precision map, JSON"),
        Column("fitness", FLOAT, "compression - penalty x degradation; -degradation where a budget is set"),
        Column("nbytes", INT, "bytes of the checkpoint, scales included, a tied head once"),
        Column("compression", FLOAT, "bytes with 16 bits everywhere / nbytes"),
        Column("ppl", FLOAT, "e^nll over the windows of the last stage, select split"),
        Column("reference_ppl", FLOAT, "the same of the unquantised model"),
        Column("kl_nats_per_token", FLOAT, "KL to the unquantised model on those windows"),
        Column("report_ppl", FLOAT, "e^nll over the report windows, which choose nothing"),
        Column("report_reference_ppl", FLOAT, "the same of the unquantised model"),
        *estimate("report_loss_nats_per_token", "nll less that of the unquantised model on the report windows"),
        Column("report_kl_nats_per_token", FLOAT, "KL to the unquantised model on the report windows"),
        Column("changed", STR, "components that differ from the champion before; empty where it stayed"),
        Column("evaluations", INT, "genomes tried up to here, at whatever stage"),
    ),
)
_SCHEME = (
    Column("scheme", STR, "its name, as bitalloc/scheme.py reads it; reference: the unquantised model"),
    Column("weights", STR, "type and method of the weights in scope"),
    Column("activations", STR, "type and scale of what they are multiplied with"),
    Column("rotation", STR, "none, online (an extra operation at run time), folded (into weights, exact), or both"),
    Column("allocation", STR, "uniform, or optimal: bits per unit by the exact solver"),
    Column("w_bits", INT, "bits of a weight; under optimal: of the uniform plan whose bytes are the budget"),
    Column("a_bits", INT, "bits of an activation"),
    Column("group_size", INT, "weights along the input that share one scale; missing: a whole row", nullable=True),
    Column("per_channel", BOOL, "one scale a row"),
    Column("quant_backend", STR, "simulated (ours), torchao or compressed-tensors; no speed follows from any"),
    Column("calib_method", STR, "what sets the codes of the weights: absmax, rtn, gptq or none"),
)
SCHEMES = Table(
    "schemes",
    "Weights and activations in few bits: what every scheme does to perplexity and predictions, corpus by corpus.",
    ("scheme", "task"),
    (
        *_SCHEME,
        Column("task", STR, "<corpus>/<split>"),
        Column("status", STR, "measured, or why this backend or family does not carry it, or the library is not here"),
        *estimate("ppl", "e^nll"),
        *estimate("nll_nats_per_token", "-log q of the next token, mean over scored tokens"),
        *estimate("kl_nats_per_token", "KL(reference || scheme), mean over scored tokens"),
        *estimate("top1", "share of tokens at which both have the same argmax"),
        Column("against", STR, "the scheme without what the name says last; empty where the table has none"),
        *estimate("kl_change_nats_per_token", "KL less that of `against`, paired by window"),
        *estimate("nll_change_nats_per_token", "nll less that of `against`, paired by window"),
        Column("n_tokens", INT, "scored tokens"),
        Column("n_windows", INT, "windows, which are resampled"),
        Column("nbytes", INT, "bytes of the matrices in scope as stored there", nullable=True),
        Column("bits_per_weight", FLOAT, "8 nbytes / their weights", nullable=True),
        Column("rotations", INT, "modules whose input is rotated at run time", nullable=True),
        Column("bits", STR, "unit -> bits, JSON", nullable=True),
        Column("seed", INT, "of the rotations and the resampling"),
        Column("scope", STR, "what is quantised and what is not, with reasons, JSON"),
        Column("scope_digest", STR, "SHA-256 of it"),
        Column("protocol", STR, "how it was measured, in full"),
    ),
)
LAYERWISE = Table(
    "layerwise",
    "A scheme for one module alone, and for all but one: where it hurts. Select split, all corpora.",
    ("scheme", "mode", "layer", "part"),
    (
        Column("scheme", STR, "its name, as bitalloc/scheme.py reads it"),
        Column("mode", STR, "all; quantise: this one alone; protect: all but this one, whose weights and input stay"),
        Column("layer", STR, "module path of the matrix; empty for all"),
        Column("block", INT, "index of the block; -1 for all"),
        Column("role", STR, "in_proj, out_proj, ...; empty for all"),
        Column("part", STR, "all, or rows of in_proj of Mamba2: z, x, B, C, dt"),
        Column("rows", INT, "outputs that are meant"),
        *estimate("kl_nats_per_token", "KL(reference || model), mean over scored tokens"),
        *estimate("saved_nats_per_token", "protect: KL of all less this one, paired by window"),
        Column("n_tokens", INT, "scored tokens"),
        Column("n_windows", INT, "windows, which are resampled"),
        Column("scope_digest", STR, "SHA-256 of what is in scope and what is not"),
        Column("protocol", STR, "how it was measured, in full"),
    ),
)
POSITION = Table(
    "position",
    "What every rule by position does to every model of a study: damage against the unquantised model.",
    ("model", "rule", "corpus", "metric"),
    (
        MODEL,
        Column("blocks", INT, "transformer blocks of the model"),
        Column("rule", STR, "member of strategies/position.py"),
        Column("corpus", STR, "name of the corpus in the configuration"),
        Column("metric", STR, "ln_ppl_ratio or kl_nats_per_token"),
        Column("nbytes", INT, "bytes of all tensors under the rule, scales included"),
        *INTERVAL,
    ),
)
CRITERIA = Table(
    "criteria",
    "What was claimed of positions, and the verdict on each claim.",
    ("criterion", "model", "corpus", "metric"),
    (
        Column("criterion", STR, "the claim"),
        Column("model", STR, "name in the model sheet, or `all` of the study"),
        Column("corpus", STR, "corpus, or empty where the claim is about several models"),
        Column("metric", STR, "ln_ppl_ratio, kl_nats_per_token (nats a token) or speedup (a ratio, of times)"),
        *INTERVAL,
        Column("comparison", STR, "how the value must stand, e.g. > 0; empty where it was not run"),
        Column("verdict", STR, "met, not met: the whole interval says so; open: it does not; not run"),
        Column("why", STR, "what stands behind the value, or why there is none"),
    ),
)
PASSKEY = Table(
    "passkey",
    "Is a key that was told in a long text still known at its end? By length and depth, same items for every scheme.",
    ("scheme", "length", "depth"),
    (
        Column("scheme", STR, "its name, as bitalloc/scheme.py reads it; reference: the unquantised model"),
        Column("length", INT, "tokens of the prompt"),
        Column("depth", FLOAT, "place of the needle, 0 the beginning, 1 the end; -1: over all depths"),
        Column("status", STR, "ok, or floor: the reference is not above chance, and nothing is claimed"),
        Column("n", INT, "items"),
        *estimate("accuracy", "share of items whose answer holds the number; Wilson's interval"),
        *estimate("key_nll_nats", "-sum of ln p over the tokens of the number, nats a key, mean over items"),
        Column("n_retained", INT, "items that the reference has right"),
        *estimate("retention", "share of them that are right; Wilson's interval; missing at the floor"),
        Column("kind", STR, "ruler or world"),
        Column("template_version", INT, "of the wording and the haystack"),
        Column("template_digest", STR, "SHA-256 of the template"),
        Column("chance", FLOAT, "accuracy of guessing"),
        Column(
            "scan_path", STR, "how a state space scanned prompts: matrix, transformers, cuda kernels", nullable=True
        ),
        Column("seed", INT, "of the items"),
    ),
)
DRIFT = Table(
    "drift",
    "How far the state of a Mamba2 strays when its projections are quantised; the state itself is not.",
    ("scheme", "metric", "t", "layer", "head"),
    (
        Column("scheme", STR, "its name; reference; floor: step, floor: bf16 state (the reference, read otherwise)"),
        Column(
            "metric", STR,
            "state_relerr, readout_relerr, kl_nats_per_token, top1, slope, rho, half_life_tokens, "
            "first_divergence_tokens, repetition_rate or nonfinite",
        ),
        Column("t", INT, "tokens that were read; -1 where the metric is about all of them"),
        Column("layer", INT, "index of the layer; -1: the mean over all"),
        Column("head", INT, "index of the head; -1: the mean over all"),
        *INTERVAL,
        Column("scan_path", STR, "how sequences were scanned: matrix, transformers or cuda kernels"),
        Column("state_dtype", STR, "type of the recurrent state"),
        Column("seed", INT, "of the resampling"),
    ),
)  # fmt: skip
