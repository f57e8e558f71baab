"""GGUF, one file for llama.cpp and what is built on it: each matrix in the type nearest above what the plan pays.

Codes go through as they are where a type holds them, which takes groups of a multiple of 32 and no rank: up to
3 bits and symmetric 4 bits in Q4_0 and symmetric 8 bits in Q8_0, exactly; 4 bits with a zero point in Q4_1, whose
minimum is rounded to 16 bits. Anything else is dequantised and quantised again (docs/formats.md says what it costs).
`k_quants` takes smaller types for it, which only llama.cpp's own quantiser writes, where llama-cpp-python is installed.

Layouts are those of ggml: a row is cut into blocks of 32 weights, each with its own 16-bit scale d. llama.cpp turns
pairs of neighbours where transformers turns halves of a head, so that rows of q and k change places in `llama`.

Legend: O outputs (rows), I inputs, G groups, B blocks of 32.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, NamedTuple

import numpy as np
import torch

from bitalloc.errors import BitallocError
from bitalloc.formats.bitalloc import Reader
from bitalloc.formats.carried import BITS, BLOCK, coded, through
from bitalloc.formats.files import replacing_file
from bitalloc.option import PASS_THROUGH, from_row
from bitalloc.quant import CompressedMatrix
from bitalloc.store import write_atomically

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
_FLOATS = ("F32", "F16", "BF16")
_INSTEAD = "the native checkpoint carries it"

# how text is cut before merging: what tokenizer.json says -> the name that llama.cpp knows it by
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CUTS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_WORDS}|\p{{N}}|{_TAIL}",): "qwen2",
    (rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_WORDS}|\p{{N}}{{1,3}}|{_TAIL}",): "llama-bpe",
}


class Entry(NamedTuple):
    """A tensor of the file: its name here and in the source, its type, its shape in weights."""

    name: str
    source: str
    type: str
    shape: tuple[int, ...]


# ---- the protocol of formats --------------------------------------------------------------------------
def refuse(reader: Reader) -> None:
    """Raise `BitallocError` for what llama.cpp would get wrong or not at all."""
    _package()
    name = reader.family.name
    if name not in ARCHITECTURES:
        raise BitallocError(f"gguf: family {name!r} is not written ({', '.join(ARCHITECTURES)} are); {_INSTEAD}")
    config = _config(reader)
    if (rope := config.rope_parameters.get("rope_type", "default")) != "default":
        raise BitallocError(f"gguf: positions of type {rope!r} are not written, only the default ones; {_INSTEAD}")
    if config.hidden_act != "silu":
        raise BitallocError(f"gguf: llama.cpp computes silu, this model {config.hidden_act!r}; {_INSTEAD}")
    biases = {f"self_attn.{part}_proj.bias" for part in "qkv"} if name == "qwen2" else set()
    for tensor in reader.untouched():
        if tensor.endswith(".bias") and tensor.removeprefix("model.layers.").partition(".")[2] not in biases:
            raise BitallocError(f"gguf: {name} has no place for {tensor}; {_INSTEAD}")
    _vocabulary(reader, config)


def nbytes(reader: Reader, *, k_quants: bool = False) -> int:
    """Exact bytes of the file that `save` will write."""
    refuse(reader)
    try:
        with TemporaryDirectory() as folder:
            with closing(_begin(reader, Path(folder) / "header", list(_entries(reader, k_quants)))) as writer:
                infos = list(writer.tensors[0].values())
            header = (Path(folder) / "header").stat().st_size
    except OSError as error:
        reason = error.strerror or str(error)
        raise BitallocError(f"cannot write a header to {gettempdir()}: {reason}; free space, then rerun") from None
    return _padded(header) + sum(_padded(info.nbytes) for info in infos)


def measure(target: Path) -> int:
    """Bytes on disk of what `nbytes` counts: the whole file."""
    return target.stat().st_size


def save(target: Path, reader: Reader, *, card: str = "", k_quants: bool = False) -> None:
    """Write the file `target`, one tensor in memory, and the card beside it (`.md`).

    With `k_quants` a file of 16-bit weights stands beside it meanwhile.
    """
    refuse(reader)
    target, entries = Path(target), list(_entries(reader, k_quants))
    with replacing_file(target) as temporary:
        if k_quants:
            with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
                wide = Path(folder) / "wide.gguf"
                _write(wide, reader, [e._replace(type="F16") if e.type.endswith("_K") else e for e in entries])
                _quantise(wide, temporary, entries)
        else:
            _write(temporary, reader, entries)
    if card:
        write_atomically(target.with_suffix(".md"), card.encode())


def _write(path: Path, reader: Reader, entries: list[Entry]) -> None:
    gguf = _package()
    with closing(_begin(reader, path, entries)) as writer:
        for entry in entries:
            writer.write_tensor_data(_data(reader, entry, gguf))
        writer.flush()
        os.fsync(writer.fout[0].fileno())


def _quantise(source: Path, target: Path, entries: list[Entry]) -> None:
    """Let llama.cpp quantise what `source` holds in 16 bits to the types of `entries`, and copy the rest."""
    try:
        import llama_cpp
    except ImportError:
        raise BitallocError("gguf: K-quants need llama-cpp-python; install it, or export without them") from None
    gguf = _package()
    matrices = [entry for entry in entries if len(entry.shape) == 2]
    overrides = (llama_cpp.llama_model_tensor_override * (len(matrices) + 1))()  # the last stays empty: the end
    for place, entry in enumerate(matrices):
        pattern = f"^{re.escape(entry.name)}$".encode()
        overrides[place] = llama_cpp.llama_model_tensor_override(pattern, gguf.GGMLQuantizationType[entry.type])
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.tt_overrides, settings.ftype, settings.nthread = overrides, _file_type(entries), torch.get_num_threads()
    settings.quantize_output_tensor = False
    settings.token_embedding_type = next(
        gguf.GGMLQuantizationType[entry.type] for entry in entries if entry.name == "token_embd.weight"
    )
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), settings):
        raise BitallocError(f"gguf: llama.cpp could not quantise {source}; free space, or export without K-quants")


# ---- tensors ------------------------------------------------------------------------------------------
def _entries(reader: Reader, k_quants: bool = False) -> Iterator[Entry]:
    """What the file holds, block after block."""
    gguf = _package()
    blocks = _config(reader).num_hidden_layers
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURES[reader.family.name].upper()], blocks)

    def name(source: str) -> str:
        if (found := names.get_name(source, try_suffixes=(".weight", ".bias"))) is None:
            raise BitallocError(f"gguf: {reader.family.name} has no place for {source}; {_INSTEAD}")
        return found

    for source, (dtype, shape) in reader.untouched().items():
        if dtype not in _FLOATS:
            raise BitallocError(f"gguf: {source} is stored as {dtype}, {', '.join(_FLOATS)} are written; {_INSTEAD}")
        # llama.cpp adds and scales by vectors in float32 only
        yield Entry(name(source), source, "F32" if len(shape) == 1 else dtype, shape)
    for layer, row in reader.plan.items():
        option, shape = from_row(row, reader.options), (row["rows"], row["columns"])
        if option.quantizer == PASS_THROUGH:
            kind = "BF16" if reader.matrix(layer).weight_OI.dtype == torch.bfloat16 else "F16"
        else:
            kind = coded(option, *shape, k_quants=k_quants)
        yield Entry(name(f"{layer}.weight"), f"{layer}.weight", kind, shape)


def _data(reader: Reader, entry: Entry, gguf: Any) -> np.ndarray:
    """The bytes of a tensor, a row of them for each row of weights."""
    layer = entry.source.removesuffix(".weight")
    if layer not in reader.plan:
        return _plain(reader.tensor(entry.source), entry.type)
    matrix = reader.matrix(layer)
    if entry.type in BITS:
        data = encode(matrix, entry.type)
    else:
        data = _plain(matrix.weight_OI if matrix.weight_OI is not None else matrix.dequantize(), entry.type)
    if not np.isfinite(gguf.dequantize(data, gguf.GGMLQuantizationType[entry.type])).all():
        raise BitallocError(f"gguf: {layer} leaves the range of {entry.type}; {_INSTEAD}")
    return data[_order(reader, layer, len(data))]


def encode(matrix: CompressedMatrix, kind: str) -> np.ndarray:
    """uint8 [O, bytes of a row]: the codes themselves where `kind` holds them, else What quantised again."""
    gguf = _package()
    if through(matrix.option, matrix.columns) != kind:
        return gguf.quantize(matrix.dequantize().numpy(), gguf.GGMLQuantizationType[kind])
    rows, blocks = matrix.rows, matrix.columns // BLOCK
    repeats = matrix.option.group_size // BLOCK
    codes_OB = matrix.codes_OI.numpy().reshape(rows, blocks, BLOCK)
    d_OB = matrix.scale_OG.numpy().repeat(repeats, axis=1)[:, :blocks, None]
    if matrix.zero_OG is None:
        zero_OB = np.full_like(codes_OB[:, :, :1], 2 ** (matrix.option.bits - 1))
    else:
        zero_OB = matrix.zero_OG.numpy().repeat(repeats, axis=1)[:, :blocks, None]
    if kind == "Q4_1":  # d code + m
        m_OB = (-zero_OB.astype(np.float32) * d_OB.astype(np.float32)).astype(np.float16)
        return _rows(d_OB, m_OB, _nibbles(codes_OB))
    q_OB = codes_OB.astype(np.int16) - zero_OB
    if kind == "Q4_0":  # d (q - 8)
        return _rows(d_OB, _nibbles((q_OB + 8).astype(np.uint8)))
    return _rows(d_OB, q_OB.astype(np.int8))  # Q8_0: d q


def _nibbles(q_OB: np.ndarray) -> np.ndarray:
    """The first half of a block in the low nibbles, the second in the high ones."""
    return q_OB[..., : BLOCK // 2] | (q_OB[..., BLOCK // 2 :] << 4)


def _rows(*parts: np.ndarray) -> np.ndarray:
    data = np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in parts], axis=2)
    return data.reshape(len(data), -1)


def _plain(tensor: torch.Tensor, kind: str) -> np.ndarray:
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    tensor = tensor.to(dtype).contiguous()
    return tensor.view(torch.uint8).numpy() if kind == "BF16" else tensor.numpy()


def _order(reader: Reader, layer: str, rows: int) -> np.ndarray | slice:
    """The rows of q and k of `llama` in the order that llama.cpp turns them in; all others as they are."""
    config, role = _config(reader), layer.rpartition(".")[2]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(role)
    if heads is None or ARCHITECTURES[reader.family.name] != "llama":
        return slice(None)
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).ravel()


# ---- header -------------------------------------------------------------------------------------------
def _begin(reader: Reader, path: Path, entries: list[Entry]) -> Any:
    """A writer at `path` that has written everything but the tensors."""
    gguf, config = _package(), _config(reader)
    writer = gguf.GGUFWriter(path, ARCHITECTURES[reader.family.name])
    _describe(writer, reader, config, entries)
    for entry in entries:
        block, size = gguf.GGML_QUANT_SIZES[kind := gguf.GGMLQuantizationType[entry.type]]
        count = int(np.prod(entry.shape))
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), count // block * size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


def _describe(writer: Any, reader: Reader, config: Any, entries: list[Entry]) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(reader.folder.name)
    writer.add_quantization_version(_package().GGML_QUANT_VERSION)
    writer.add_file_type(_file_type(entries))
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(_context(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for key, value in _vocabulary(reader, config).items():
        getattr(writer, f"add_{key}")(value)


def _context(config: Any) -> int:
    """Positions; no more than a sliding window, which llama.cpp does not know: within it there is no difference."""
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ()) or config.model_type == "mistral"
    return min(config.max_position_embeddings, window) if window and slides else config.max_position_embeddings


def _file_type(entries: list[Entry]) -> int:
    """What llama.cpp shows as the type of the whole: that of most weights of matrices."""
    weights: dict[str, int] = {}
    for entry in entries:
        if entry.name.startswith("blk.") and len(entry.shape) == 2:
            weights[entry.type] = weights.get(entry.type, 0) + int(np.prod(entry.shape))
    most = max(weights, key=lambda kind: weights[kind])
    name = f"MOSTLY_{most}_S" if most in {"Q3_K", "Q4_K", "Q5_K"} else f"MOSTLY_{most}"
    return int(_package().LlamaFileType[name])


# ---- vocabulary ---------------------------------------------------------------------------------------
def _vocabulary(reader: Reader, config: Any) -> dict[str, Any]:
    """What the writer's add_... methods are told of the tokenizer. Raises `BitallocError` when GGUF has no word for it.

    A folder without a tokenizer makes a file without vocabulary, for token ids only.
    """
    path = reader.folder / "tokenizer.json"
    if not path.is_file():
        if any(reader.folder.glob("tokenizer*")) or (reader.folder / "merges.txt").is_file():
            raise BitallocError(
                f"gguf: {reader.folder} has a tokenizer but no tokenizer.json; load it with AutoTokenizer, "
                "save it into the source folder and compress again"
            )
        return {"tokenizer_model": "none"}
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    model = tokenizer["model"]
    if model["type"] != "BPE":
        raise BitallocError(f"gguf: a {model['type']} tokenizer is not written, only BPE; {_INSTEAD}")
    kinds = _package().TokenType
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    ids = {index: text for text, index in model["vocab"].items()} | {k: token["content"] for k, token in added.items()}
    if max(ids) >= config.vocab_size:
        raise BitallocError(
            f"gguf: the tokenizer has {max(ids) + 1} tokens, the embedding {config.vocab_size} rows; "
            "correct the source folder and compress again"
        )
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    pieces = model.get("byte_fallback", False)  # SentencePiece in the clothes of BPE

    def kind(index: int) -> int:
        if index not in ids:
            return kinds.UNUSED
        if pieces and ids[index] == model.get("unk_token"):
            return kinds.UNKNOWN
        if index in added:
            return kinds.CONTROL if added[index]["special"] else kinds.USER_DEFINED
        return kinds.BYTE if pieces and ids[index].startswith("<0x") and len(ids[index]) == 6 else kinds.NORMAL

    says: dict[str, Any] = {
        "tokenizer_model": "llama" if pieces else "gpt2",
        "tokenizer_pre": "default" if pieces else _cut(tokenizer["pre_tokenizer"]),
        "token_list": [ids.get(index, f"[PAD{index}]") for index in range(config.vocab_size)],
        "token_types": [int(kind(index)) for index in range(config.vocab_size)],
    }
    if pieces:
        # a piece scores by its first merge: the earlier, the better
        score: dict[str, float] = {}
        for place, (left, right) in enumerate(merges):
            score.setdefault(left + right, -float(place))
        worst = -float(len(merges))
        says["token_scores"] = [score.get(text, worst if text in model["vocab"] else 0) for text in says["token_list"]]
    else:
        says["token_merges"] = [" ".join(merge) for merge in merges]
    first = _first_of_template(tokenizer.get("post_processor"))
    says["add_bos_token"] = first is not None and first == ids.get(config.bos_token_id)
    says["add_eos_token"] = False
    says["add_space_prefix"] = _prefixes_space(tokenizer)
    eos = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    unknown = model["vocab"].get(model["unk_token"]) if pieces and model.get("unk_token") else None
    for key, index in {"bos": config.bos_token_id, "eos": eos, "pad": config.pad_token_id, "unk": unknown}.items():
        if index is not None and index >= 0:
            says[f"{key}_token_id"] = index
    if isinstance(template := _settings(reader).get("chat_template"), str):
        says["chat_template"] = template
    return says


def _cut(pre: dict[str, Any] | None) -> str:
    """llama.cpp's name of the pre-tokenizer."""
    steps = pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre or {"type": "none"}]
    signature = []
    for step in steps:
        if step["type"] == "Split":
            signature.append(step["pattern"].get("Regex", ""))
        elif step["type"] == "Digits" and step["individual_digits"]:
            signature.append("Digits")
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            # after a split by a pattern it cuts no more
            signature += ["ByteLevel"] if step.get("use_regex", True) else []
        else:
            signature.append(f"unknown {step['type']}")
    if (name := _CUTS.get(tuple(signature))) is None:
        raise BitallocError(f"gguf: llama.cpp's name of the pre-tokenizer {signature} is not known; {_INSTEAD}")
    return name


def _first_of_template(post: dict[str, Any] | None) -> str | None:
    """The special token that every text begins with."""
    for step in (post or {}).get("processors", [post or {}]):
        if step.get("type") == "TemplateProcessing" and step["single"] and "SpecialToken" in step["single"][0]:
            return step["single"][0]["SpecialToken"]["id"]
    return None


def _prefixes_space(tokenizer: dict[str, Any]) -> bool:
    normalizer, pre = tokenizer.get("normalizer") or {}, tokenizer.get("pre_tokenizer") or {}
    prepends = any(step.get("type") == "Prepend" for step in normalizer.get("normalizers", [normalizer]))
    return prepends or (pre.get("type") == "Metaspace" and pre.get("prepend_scheme", "always") != "never")


# ---- small things -------------------------------------------------------------------------------------
def _settings(reader: Reader) -> dict[str, Any]:
    path = reader.folder / "tokenizer_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _config(reader: Reader) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(reader.folder, trust_remote_code=False, local_files_only=True)


def _padded(count: int) -> int:
    return -(-count // 32) * 32


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise BitallocError("gguf: the package is not installed; pip install 'bitalloc[gguf]'") from None
    return gguf
