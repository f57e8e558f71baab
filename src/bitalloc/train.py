"""Training on the synthetic world: the embedded model `tiny`, a Qwen2 of 0.92M parameters, and GPT-2s of any depth.

AdamW with a warm-up, flat, linear-decay schedule in two phases (4e-3, then 3e-3), in float32, which is 2.6 times
faster than bfloat16 autocast on a CPU without bfloat16 instructions. Key binding comes late, as a phase
transition, and an under-trained model hardly suffers from 2 bits, so no allocation could gain anything on
it: do not shorten the training. The GPT-2s are only asked where a loss of precision hurts: minutes do.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load, save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from bitalloc.progress import Progress
from bitalloc.provenance import source_digest
from bitalloc.store import Store, digest, file_digest
from bitalloc.world import World, docstrings, documents

END = "<eos>"


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


def train_model(
    tokens: torch.Tensor,
    *,
    config: PreTrainedConfig,
    steps: tuple[int, ...],
    rates: tuple[float, ...],
    seed: int,
    batch: int = 16,
) -> PreTrainedModel:
    """Train on windows of 128 tokens drawn from `tokens` [n]; one optimiser and schedule a phase."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    draw = torch.Generator().manual_seed(seed)
    progress = Progress("train", sum(steps), unit="steps")
    window = 128
    for phase_steps, rate in zip(steps, rates, strict=True):
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step, n=phase_steps: min(1.0, step / 60 + 0.01) * min(1.0, max(0.02, (1 - step / n) / 0.6)),
        )
        for _ in range(phase_steps):
            starts = torch.randint(0, len(tokens) - window - 1, (batch,), generator=draw)
            ids = torch.stack([tokens[s : s + window] for s in starts.tolist()]).long()
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
    steps: tuple[int, ...] = (4000, 1375),
    rates: tuple[float, ...] = (4e-3, 3e-3),
    seed: int = 0,
) -> None:
    """Train tokenizer and model and save both under `path` in Hugging Face format (float16 safetensors)."""
    texts = _texts(count, seed)
    tokenizer = train_tokenizer(texts[:8000], vocabulary=vocabulary)
    tokens = _tokens(tokenizer.backend_tokenizer, texts)
    model = train_model(tokens, config=qwen2(vocabulary), steps=steps, rates=rates, seed=seed)
    model.half().save_pretrained(path)
    tokenizer.save_pretrained(path)


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
            trained = train_model(tokens, config=config, steps=(steps,), rates=(2e-3,), seed=seed, batch=8)
            weights = {name: tensor.contiguous() for name, tensor in trained.half().state_dict().items()}
            store.put(key, {"blocks": blocks}, save({n: t for n, t in weights.items() if n != "lm_head.weight"}))
    model = AutoModelForCausalLM.from_config(gpt2(len(known), blocks), dtype=torch.float16)
    model.load_state_dict(load(store.tensors(key).read_bytes()), strict=False)  # the head is tied
    model.save_pretrained(path)
    known.save_pretrained(path)


def _texts(count: int, seed: int) -> list[str]:
    return [text for _, text in documents(World(), count=count, seed=seed + 1, texts=docstrings()["train"])]


def _tokens(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """Ids [n] of documents one after the other, each behind the bos token."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        ids += [0, *encoding.ids]
    return torch.tensor(ids, dtype=torch.int32)
