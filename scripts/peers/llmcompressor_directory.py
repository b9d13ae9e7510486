"""Quantizes a checkpoint with llm-compressor as its examples do, in its own environment.

A JSON object on the standard input: model, output (paths), scheme (the name of one of its presets, or W8A8_STATIC),
alpha (of its SmoothQuant; null for none), gptq (whether its GPTQ chooses the codes), tokens (sequences to calibrate
on), dtype ("auto" as its examples have it, or "float32"). Prints nothing; the directory is complete when it ends
with 0.
"""

import json
import sys

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

STATIC = {
    "group_0": {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
        "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor"},
    }
}


def main() -> None:
    job = json.load(sys.stdin)
    dtype = "auto" if job["dtype"] == "auto" else getattr(torch, job["dtype"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    recipe: list = [] if job["alpha"] is None else [SmoothQuantModifier(smoothing_strength=job["alpha"])]
    quantize = GPTQModifier if job["gptq"] else QuantizationModifier
    if job["scheme"] == "W8A8_STATIC":
        recipe.append(quantize(config_groups=STATIC, ignore=["lm_head"]))
    else:
        recipe.append(quantize(targets="Linear", scheme=job["scheme"], ignore=["lm_head"]))
    options = {}
    looks = job["scheme"] not in ("FP8_DYNAMIC", "W4A16", "NVFP4A16") or job["alpha"] is not None or job["gptq"]
    if looks:
        rows = [{"input_ids": tokens, "attention_mask": [1] * len(tokens)} for tokens in job["tokens"]]
        options = {
            "dataset": Dataset.from_list(rows),
            "num_calibration_samples": len(rows),
            "max_seq_length": len(job["tokens"][0]),
        }
    oneshot(model=model, processor=tokenizer, recipe=recipe, **options)
    model.save_pretrained(job["output"], save_compressed=True)


if __name__ == "__main__":
    main()
