"""Quantizes matrices with llm-compressor, as its data-free pipeline does a layer's weight; in its own environment.

One job a line on the standard input, one answer a line to the file descriptor that the argument names: libraries print
on the standard output. A job is a JSON object: rows, importance
and output (paths of .npy, .npy and .npz), scheme (`weights` of the configuration, and the storage's format), observer
and threads. The answer holds the seconds that its observer and its compressor took; the output holds the compressed
tensors by suffix, their bits as bytes of the last dimension.
"""

import json
import os
import sys
import time

import numpy as np
import torch
from compressed_tensors.compressors import compress_module
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    initialize_module_for_quantization,
)
from llmcompressor.modifiers.quantization.calibration import initialize_observer, observe, update_qparams
from loguru import logger


def quantize(job: dict) -> dict[str, float]:
    torch.set_num_threads(job["threads"])
    rows = torch.from_numpy(np.load(job["rows"]))
    module = torch.nn.Linear(rows.shape[1], rows.shape[0], bias=False, dtype=torch.bfloat16)
    module.weight.data.copy_(rows)
    module.weight.requires_grad_(False)
    weights = QuantizationArgs(**job["scheme"]["weights"], observer=job["observer"])
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=job["scheme"]["format"])
    initialize_module_for_quantization(module, scheme)
    start = time.perf_counter()
    initialize_observer(module, "weight")
    if "imatrix" in job["observer"]:
        # What its hook leaves after one token.
        module.weight_observer._imatrix_sum = torch.from_numpy(np.load(job["importance"]))
        module.weight_observer._imatrix_count = torch.tensor(1)
    observe(module, "weight")
    update_qparams(module, "weight")
    observed = time.perf_counter()
    compress_module(module)
    seconds = {"observe": observed - start, "compress": time.perf_counter() - observed}
    state = {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}
    bits = {name: tensor.view(torch.uint8).numpy() for name, tensor in state.items() if name.startswith("weight")}
    np.savez(job["output"], **bits)
    return seconds


def main() -> None:
    logger.remove()
    with os.fdopen(int(sys.argv[1]), "w") as answers:
        for line in sys.stdin:
            print(json.dumps(quantize(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
