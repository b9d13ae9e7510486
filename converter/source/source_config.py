"""config.json of a directory, and what the files beside it say of its weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitwright.converter.source.checkpoint import metadata_files
from bitwright.converter.source.known_cases import refuse_adapter, refuse_without_config
from bitwright.converter.source.quantized.decode import KEY as QUANTIZATION
from bitwright.converter.source.sentence_transformers import embedding_facts
from bitwright.converter.source.values import check_text
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.regular_file import read_json
from bitwright.formats.files.stored_tensor import DTYPE_BYTES, SourceTensor

# What a dtype that no weight is read in is the sign of.
_PACKED = {
    "F8_E4M3": "8-bit floats",
    "F8_E5M2": "8-bit floats",
    "I8": "8-bit integers",
    "U8": "packed bytes, as of bitsandbytes, MXFP4 or NVFP4",
    "I32": "packed integers, as of GPTQ, AWQ or compressed-tensors",
}


def read_config(directory: Path, model: str) -> dict[str, Any]:
    """config.json, a text model's own configuration lifted to the top; model: what the user calls it.

    Raises ConvertError for a directory without one, and for one that holds an adapter, too.
    """
    metadata_files(directory)  # before anything opens one that is a trap
    path = directory / "config.json"
    if not path.is_file():
        raise refuse_without_config(directory, model)
    refuse_adapter(directory, model)
    config = {**_stated_beside(directory), **read_json(path)}
    check_text(config, str(path))
    if "transformers_weights" in config:
        raise ConvertError(
            f"the configuration names other weights than its directory has: {config['transformers_weights']!r}",
            f"{path}: transformers_weights",
            "name that file model.safetensors, and take the key out of config.json",
        )
    config |= embedding_facts(directory, config)
    text_config = config.get("text_config")
    if not isinstance(text_config, dict):
        return config
    # The head belongs to the whole model, whose configuration says alone what transformers does with it.
    return {**config, **text_config, "tie_word_embeddings": config.get("tie_word_embeddings", True)}


def _stated_beside(directory: Path) -> dict[str, Any]:
    """`quantization_config` as ModelOpt and AutoGPTQ have it in a file of its own."""
    modelopt, gptq = directory / "hf_quant_config.json", directory / "quantize_config.json"
    if modelopt.is_file():
        stated = read_json(modelopt).get("quantization")
        return {QUANTIZATION: {"quant_method": "modelopt", **(stated if isinstance(stated, dict) else {})}}
    return {QUANTIZATION: {"quant_method": "gptq", **read_json(gptq)}} if gptq.is_file() else {}


def check_unquantized(config: Mapping[str, Any], tensors: Mapping[str, SourceTensor], where: str) -> list[str]:
    """What to note of a configuration that calls weights quantized which are not.

    tensors: those that the model is made of. Raises ConvertError for weights in another dtype than F64, F32, F16, BF16.
    """
    stated = config.get(QUANTIZATION)
    method = str(stated.get("quant_method", "unknown")) if isinstance(stated, dict) else "unknown"
    for name, tensor in tensors.items():
        if tensor.dtype in DTYPE_BYTES:
            continue
        kind = f" ({_PACKED[tensor.dtype]})" if tensor.dtype in _PACKED else ""
        by = f" by {method}" if stated else ""
        raise ConvertError(
            f"the checkpoint is quantized already{by}: {name!r} is stored as {tensor.dtype}{kind}; quantizing its"
            " rounded weights again would add their errors up",
            f"{tensor.file}: {name}",
            f"convert the original checkpoint in one of {', '.join(DTYPE_BYTES)} instead",
        )
    if not stated:
        return []
    dtypes = ", ".join(sorted({tensor.dtype for tensor in tensors.values()}))
    return [
        f"{where} calls the model quantized ({method}), and all its weights are stored whole, in {dtypes}: they are"
        " converted as they are, and its quantization_config is left out"
    ]
