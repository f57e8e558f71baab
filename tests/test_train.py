"""Training: a few steps make a checkpoint that the rest of the chain can read, and lower the loss."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from bitalloc import train
from bitalloc.families import family
from bitalloc.models import Checkpoint
from bitalloc.world import World, docstrings, documents


def test_a_short_training_saves_a_checkpoint_and_a_tokenizer(tmp_path):
    train.train(tmp_path, count=300, vocabulary=300, phases=[train.Phase(2, 1e-3), train.Phase(1, 1e-3)])
    checkpoint = Checkpoint(tmp_path, family("qwen2"))
    assert checkpoint.tensor("model.embed_tokens.weight").dtype == torch.float16
    assert checkpoint.weight("model.layers.3.mlp.down_proj").shape == (128, 384)
    tokens = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("12+07=19.").tokens
    assert tokens == ["1", "2", "+", "0", "7", "=", "1", "9", "."]  # every digit alone, so that sums can be learned


def test_steps_lower_the_loss_and_repeat():
    texts = [text for _, text in documents(World(), count=40, seed=1, texts=docstrings()["train"])]
    tokenizer = train.train_tokenizer(texts, vocabulary=300)
    ids = torch.tensor([i for text in texts for i in [0, *tokenizer(text)["input_ids"]]])

    def loss(steps: int) -> float:
        model = train.train_model([(train.Phase(steps, 4e-3), ids)], config=train.qwen2(300), seed=0)
        with torch.inference_mode():
            return model(ids[None, :256], labels=ids[None, :256]).loss.item()

    once = loss(1)
    assert loss(6) < once - 0.3
    assert loss(1) == once


def test_a_mamba2_is_trained_with_the_tokenizer_of_another_model(tmp_path):
    phases = [train.Phase(1, 1e-3, window=24, batch=2), train.Phase(1, 1e-3, window=70, batch=1)]
    train.train_mamba2(tmp_path, tokenizer=Path("resources/tiny"), count=60, phases=phases)
    checkpoint = Checkpoint(tmp_path, family("mamba2"))
    assert checkpoint.weight("backbone.layers.3.mixer.in_proj").shape == (256 + 384 + 8, 128)
    assert "lm_head.weight" not in checkpoint.names  # tied
    assert (tmp_path / "tokenizer.json").read_bytes() == Path("resources/tiny/tokenizer.json").read_bytes()


def test_an_aligned_state_space_begins_by_looking_up_what_followed():
    """Of the first layer, C of a token meets B of the token behind the same one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(train.mamba2(64))
    train.align(model)
    mixer = model.backbone.layers[0].mixer
    x_BTD = torch.randn(1, 12, 128)
    x_BTD[0, 9:] = x_BTD[0, 2:5]  # the tokens 9, 10, 11 repeat 2, 3, 4
    with torch.no_grad():
        rows = mixer.in_proj(x_BTD)[..., mixer.intermediate_size : -mixer.num_heads].transpose(1, 2)
        B_NT, C_NT = mixer.conv1d(rows)[0, :, :12].split([256, 64, 64])[1:]
    assert (C_NT[:, 11] @ B_NT).argmax() == 5
