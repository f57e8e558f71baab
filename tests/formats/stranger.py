"""Run where bitalloc is unknown: logits of exported checkpoints -> <folder>.safetensors beside each.

python stranger.py IDS FOLDER...
"""

import importlib.util
import sys
from pathlib import Path


def main() -> None:
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    ids = load_file(sys.argv[1])["ids"]
    for folder in map(Path, sys.argv[2:]):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.inference_mode():
            model(ids)
            if (folder / "adapter").is_dir():
                model = PeftModel.from_pretrained(model, folder / "adapter")
            save_file({"logits": model(ids).logits.contiguous()}, folder.with_name(f"{folder.name}.safetensors"))


if __name__ == "__main__":
    assert importlib.util.find_spec("bitalloc") is None, "bitalloc is known here"
    main()
