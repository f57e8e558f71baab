"""Run where bitalloc is unknown: logits of an exported checkpoint -> logits.safetensors beside it."""

import importlib.util
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

assert importlib.util.find_spec("bitalloc") is None, "bitalloc is known here"
for folder in map(Path, sys.argv[2:]):
    ids = load_file(sys.argv[1])["ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        model(ids)
        if (folder / "adapter").is_dir():
            model = PeftModel.from_pretrained(model, folder / "adapter")
        save_file({"logits": model(ids).logits.contiguous()}, folder.with_suffix(".safetensors"))
