"""Run where bitalloc is unknown: logits of exported checkpoints -> <folder>.safetensors beside each.

python stranger.py IDS FOLDER... --refused FOLDER...: the latter are not to be loaded; prints the error of each
"""

import importlib.util
import sys
from pathlib import Path


def main() -> None:
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    end = sys.argv.index("--refused")
    for folder in sys.argv[end + 1 :]:
        try:
            AutoModelForCausalLM.from_pretrained(folder)
            print("loaded")
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told
            print(type(error).__name__)
    ids = load_file(sys.argv[1])["ids"]
    for folder in map(Path, sys.argv[2:end]):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.inference_mode():
            model(ids)
            if (folder / "adapter").is_dir():
                model = PeftModel.from_pretrained(model, folder / "adapter")
            save_file({"logits": model(ids).logits.contiguous()}, folder.with_name(f"{folder.name}.safetensors"))


if __name__ == "__main__":
    assert importlib.util.find_spec("bitalloc") is None, "bitalloc is known here"
    main()
