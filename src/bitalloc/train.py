"""Training of the embedded model `tiny`: a Qwen2 of 0.92M parameters on the synthetic world.

AdamW with a warm-up, flat, linear-decay schedule in two phases (4e-3, then 3e-3), in float32, which is 2.6 times
faster than bfloat16 autocast on a CPU without bfloat16 instructions. Key binding comes late, as a phase
transition, and an under-trained model hardly suffers from 2 bits, so no allocation could gain anything on
it: do not shorten the training.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from bitalloc.progress import Progress
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


def train_model(
    tokens: torch.Tensor, *, vocabulary: int, steps: tuple[int, ...], rates: tuple[float, ...], seed: int
) -> Qwen2ForCausalLM:
    """Train on windows of 128 tokens drawn from `tokens` [n]; one optimiser and schedule a phase."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
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
    )
    draw = torch.Generator().manual_seed(seed)
    progress = Progress("train", sum(steps), unit="steps")
    batch, window = 16, 128
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
    texts = [text for _, text in documents(World(), count=count, seed=seed + 1, texts=docstrings()["train"])]
    tokenizer = train_tokenizer(texts[:8000], vocabulary=vocabulary)
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts):
        ids += [0, *encoding.ids]
    model = train_model(
        torch.tensor(ids, dtype=torch.int32), vocabulary=vocabulary, steps=steps, rates=rates, seed=seed
    )
    model.half().save_pretrained(path)
    tokenizer.save_pretrained(path)
