"""Random models of every family, small enough to build in milliseconds."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    Mamba2Config,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
)

VOCABULARY, CONTEXT, BLOCKS = 96, 64, 3
_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
_BODY = {**_TOKENS, "hidden_size": 32, "max_position_embeddings": CONTEXT, "num_hidden_layers": BLOCKS}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen2": Qwen2Config(
        **_BODY,
        **_HEADS,
        tie_word_embeddings=True,
        # the last block attends to a window, the others to everything
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=2,
    ),
    "llama": LlamaConfig(**_BODY, **_HEADS),
    "mistral": MistralConfig(**_BODY, **_HEADS, sliding_window=8),
    "gpt2": GPT2Config(**_TOKENS, n_embd=32, n_positions=CONTEXT, n_layer=BLOCKS, n_head=4),
    "opt": OPTConfig(**_BODY, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=24),
    "mamba2": Mamba2Config(
        **_TOKENS,
        hidden_size=32,
        num_hidden_layers=BLOCKS,
        num_heads=4,
        head_dim=16,
        state_size=8,
        n_groups=1,
        expand=2,
        chunk_size=8,
        tie_word_embeddings=False,
    ),
    "phi": PhiConfig(**_BODY, num_attention_heads=4, intermediate_size=48, partial_rotary_factor=0.5),
}


def build(family: str, *, seed: int = 0) -> torch.nn.Module:
    """A model with every parameter drawn, biases and norms too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2).add_(1.0 if parameter.dim() == 1 else 0.0)
    return model


def save(family: str, folder: Path, *, seed: int = 0, **how: str) -> Path:
    build(family, seed=seed).save_pretrained(folder, **how)
    return folder
