"""llm-compressor's GPTQ at one setting for all matrices, the largest that fits; its defaults otherwise.

Symmetric codes, packed as compressed-tensors do. Matrices whose width is no multiple of the group have one a row.
"""

from __future__ import annotations

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM
from whole import Job, Stored, largest, linear, work


def quantise(job: Job) -> tuple[str, Stored | None]:
    bits, group_size = largest(job, zeros=False)
    shared = {"num_bits": bits, "type": "int", "symmetric": True}
    groups = {}
    for odd in (False, True):
        targets = [name for name, sides in job.layers.items() if bool(sides[1] % group_size) == odd]
        how = {"strategy": "channel"} if odd else {"strategy": "group", "group_size": group_size}
        if targets:
            groups[f"group_{len(groups)}"] = {"targets": targets, "weights": shared | how}
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
    ids_NT = job.ids()
    data = Dataset.from_dict({"input_ids": ids_NT.tolist(), "attention_mask": [[1] * ids_NT.shape[1]] * len(ids_NT)})
    oneshot(
        model=model,
        dataset=data,
        recipe=GPTQModifier(config_groups=groups, ignore=["lm_head"]),
        max_seq_length=ids_NT.shape[1],
        num_calibration_samples=len(ids_NT),
    )
    model.half()  # scales are stored in the type of the model: 32 bits where that has
    job.keep(linear(model, job.layers))
    model.save_pretrained(job.checkpoint, save_compressed=True)
    return f"{bits} bits, group {group_size}", None


if __name__ == "__main__":
    work("llmcompressor", quantise)
