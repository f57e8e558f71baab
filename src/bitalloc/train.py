"""Training on the synthetic world: the embedded models `tiny`, a Qwen2 of 0.92M parameters, and `tiny_mamba2`, a Mamba2
of 0.60M, and GPT-2s of any depth.

AdamW with a warm-up, flat, linear-decay schedule in two phases (4e-3, then 3e-3), in float32, which is 2.6 times
faster than bfloat16 autocast on a CPU without bfloat16 instructions. Key binding comes late, as a phase
transition, and an under-trained model hardly suffers from 2 bits, so no allocation could gain anything on
it: do not shorten the training. The GPT-2s are only asked where a loss of precision hurts: minutes do.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load, save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    Mamba2Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from bitalloc.progress import Progress
from bitalloc.provenance import source_digest
from bitalloc.scan import matrix_scan
from bitalloc.store import Store, digest, file_digest
from bitalloc.world import DOCUMENT_SHARES, LONG_SHARES, World, docstrings, documents

END = "<eos>"


@dataclass(frozen=True)
class Phase:
    """Steps with one optimiser and one schedule, each on `batch` windows of `window` tokens of such documents."""

    steps: int
    rate: float
    window: int = 128
    batch: int = 16
    shares: Mapping[str, float] = field(default_factory=lambda: DOCUMENT_SHARES)


def train_tokenizer(texts: list[str], *, vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is a token of its own, so that sums can be learned."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def qwen2(vocabulary: int) -> Qwen2Config:
    """The shape of `tiny`."""
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.06,
        bos_token_id=0,
        eos_token_id=0,
    )


def gpt2(vocabulary: int, blocks: int) -> GPT2Config:
    """A narrow GPT-2 of that depth: 0.4M parameters with 6 blocks, 1.3M with 24. No dropout: nothing is seen twice."""
    shape = {"n_embd": 64, "n_layer": blocks, "n_head": 4, "n_positions": 256}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2Config(vocab_size=vocabulary, **shape, **ends, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def mamba2(vocabulary: int) -> Mamba2Config:
    """The shape of `tiny_mamba2`: in_proj [648, 128] and out_proj [128, 256] in each of 4 blocks."""
    return Mamba2Config(
        vocab_size=vocabulary,
        hidden_size=128,
        num_hidden_layers=4,
        state_size=64,
        expand=2,
        num_heads=8,
        head_dim=32,
        n_groups=1,
        chunk_size=64,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


@torch.no_grad()
def align(model: PreTrainedModel) -> None:
    """Let each state space begin as one that looks up what followed: B is a copy of C, its filter a token later.

    B_s C_t is then large where the tokens before s are those up to t, and what is read from the state is s. From
    independent draws this is found late, as a phase transition: not within 1,000 steps of 1,024 tokens (docs/LOG.md).
    """
    for block in model.backbone.layers:
        mixer = block.mixer
        size, inner = mixer.n_groups * mixer.ssm_state_size, mixer.intermediate_size
        B, C = (slice(inner + k * size, inner + (k + 1) * size) for k in (0, 1))
        rows, taps = mixer.in_proj.weight[inner:], mixer.conv1d.weight  # behind the gate z: x, B, C and dt
        rows[B] = rows[C]
        taps[B, :, :-1], taps[B, :, -1] = taps[C, :, 1:], 0


def train_model(
    lessons: Sequence[tuple[Phase, torch.Tensor]],
    *,
    config: PreTrainedConfig,
    seed: int,
    prepare: Callable[[PreTrainedModel], None] = lambda model: None,
) -> PreTrainedModel:
    """Train phase by phase, each on windows drawn from its tokens [n], a model that `prepare` has seen first."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    prepare(model)
    draw = torch.Generator().manual_seed(seed)
    progress = Progress("train", sum(phase.steps for phase, _ in lessons), unit="steps")
    for phase, tokens in lessons:
        optimizer = torch.optim.AdamW(model.parameters(), lr=phase.rate, weight_decay=0.1, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step, n=phase.steps: min(1.0, step / 60 + 0.01) * min(1.0, max(0.02, (1 - step / n) / 0.6)),
        )
        for _ in range(phase.steps):
            starts = torch.randint(0, len(tokens) - phase.window - 1, (phase.batch,), generator=draw)
            ids = torch.stack([tokens[s : s + phase.window] for s in starts.tolist()]).long()
            logits = model(ids).logits
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.advance(note=f"loss {loss.item():.3f} nats a token")
    return model.eval()


def train(
    path: Path,
    *,
    count: int = 60_000,
    vocabulary: int = 1024,
    phases: Sequence[Phase] = (Phase(4000, 4e-3), Phase(1375, 3e-3)),
    seed: int = 0,
) -> None:
    """Train tokenizer and model and save both under `path` in Hugging Face format (float16 safetensors)."""
    texts = _texts(count, seed)
    tokenizer = train_tokenizer(texts[:8000], vocabulary=vocabulary)
    tokens = _tokens(tokenizer.backend_tokenizer, texts)
    model = train_model([(phase, tokens) for phase in phases], config=qwen2(vocabulary), seed=seed)
    model.half().save_pretrained(path)
    tokenizer.save_pretrained(path)


def train_mamba2(
    path: Path,
    *,
    tokenizer: Path,
    count: int = 8_000,
    phases: Sequence[Phase] = (
        Phase(300, 4e-3, window=128, batch=8, shares={"key": 0.6, "copy": 0.4}),
        Phase(700, 4e-3, window=256, batch=4, shares=LONG_SHARES),
        Phase(500, 2e-3, window=512, batch=2, shares=LONG_SHARES),
    ),
    seed: int = 0,
) -> None:
    """Train `tiny_mamba2` with the tokenizer of another model, and save both under `path` (float16 safetensors).

    Keys and copies come first, then keys in long haystacks and all else (`LONG_SHARES`), in windows of up to 512
    tokens. The scan is that of `bitalloc.scan`.
    """
    known = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    lessons = [(phase, _tokens(known.backend_tokenizer, _texts(count, seed, phase.shares))) for phase in phases]
    with matrix_scan():
        model = train_model(lessons, config=mamba2(len(known)), seed=seed, prepare=align)
    model.half().save_pretrained(path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / file, path / file)


def train_gpt2(
    path: Path, *, blocks: int, tokenizer: Path, store: Store, count: int = 8000, steps: int = 800, seed: int = 0
) -> None:
    """Train a GPT-2 of `blocks` blocks with the tokenizer of another model and save it under `path`, in float16.

    The weights are a shard of the store: trained once for each depth, tokenizer and version of this code.
    """
    known = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    settings = [blocks, file_digest(tokenizer / "tokenizer.json"), count, steps, seed]
    key = digest([source_digest("bitalloc.train"), *settings])
    with store.lock(key, f"[train] another process trains the GPT-2 of {blocks} blocks; waiting for it"):
        if store.get(key) is None:
            tokens, config = _tokens(known.backend_tokenizer, _texts(count, seed)), gpt2(len(known), blocks)
            trained = train_model([(Phase(steps, 2e-3, batch=8), tokens)], config=config, seed=seed)
            weights = {name: tensor.contiguous() for name, tensor in trained.half().state_dict().items()}
            store.put(key, {"blocks": blocks}, save({n: t for n, t in weights.items() if n != "lm_head.weight"}))
    model = AutoModelForCausalLM.from_config(gpt2(len(known), blocks), dtype=torch.float16)
    model.load_state_dict(load(store.tensors(key).read_bytes()), strict=False)  # the head is tied
    model.save_pretrained(path)
    known.save_pretrained(path)


def _texts(count: int, seed: int, shares: Mapping[str, float] = DOCUMENT_SHARES) -> list[str]:
    texts = docstrings()["train"]
    return [text for _, text in documents(World(), count=count, seed=seed + 1, texts=texts, shares=shares)]


def _tokens(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """Ids [n] of documents one after the other, each behind the bos token."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        ids += [0, *encoding.ids]
    return torch.tensor(ids, dtype=torch.int32)
