"""A GGUF file as the source: its tensors and metadata are taken over as they are, and quantized ones are decoded where
that is asked for."""

from collections import Counter
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
from gguf import Keys
from gguf.gguf_writer import GGUFValue

from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.gguf import EncodedTensor, GgufFile, TensorEntry, read_gguf
from bitwright.formats.files.regular_file import open_regular
from bitwright.formats.files.stored_tensor import DTYPE_BYTES, SourceTensor, StoredTensor
from bitwright.formats.quantized.decoded_tensor import DecodedTensor
from bitwright.formats.quantized.ggml_rows import GgmlRows

# Types that no weight has.
_INTEGERS = ("I8", "I16", "I32", "I64")


def open_gguf(path: Path, from_quantized: bool = False) -> Checkpoint:
    """The GGUF file as a checkpoint. from_quantized: its quantized tensors are decoded as they are read.

    Raises ConvertError for a file that is no GGUF, is cut short or malformed, for one of several splits, and for
    quantized tensors where they are not asked for.
    """
    with open_regular(path) as file:
        if file.read(4) != b"GGUF":
            raise ConvertError("this file is no GGUF", str(path), "give a GGUF file or the directory of a checkpoint")
    reader = read_gguf(path)
    if (reader.value(Keys.Split.LLM_KV_SPLIT_COUNT, int) or 1) > 1:
        raise ConvertError(
            "this is one of several splits of a model", str(path), "merge them first: llama-gguf-split --merge"
        )
    tensors: dict[str, SourceTensor] = {}
    decoded: Counter[str] = Counter()
    scales = _second_scales(reader) if from_quantized else {}
    for tensor in reader.tensors:
        dtype = tensor.ggml_type.name
        if tensor.name.removesuffix(".scale") in scales:
            continue
        if dtype in DTYPE_BYTES:
            tensors[tensor.name] = StoredTensor(dtype, tensor.shape, path, tensor.offset)
            continue
        if not from_quantized or dtype in _INTEGERS:
            raise ConvertError(
                f"{tensor.name!r} is quantized already ({dtype}); quantizing rounded weights again adds the errors up",
                str(path),
                "convert from the original checkpoint, or from its GGUF in F32, F16 or BF16; where there is none, add"
                " --from-quantized, and what was lost stays lost",
            )
        decoded[dtype] += 1
        tensors[tensor.name] = DecodedTensor.of(
            GgmlRows(replace(tensor, scales=scales.get(tensor.name.removesuffix(".weight"), ()))), "F32"
        )
    notes: tuple[str, ...] = ()
    if decoded:
        kinds = ", ".join(f"{kind} ({n} tensors)" for kind, n in decoded.most_common())
        notes = (
            f"the source is quantized already: {kinds}; its errors and those of the new formats add up, but where a"
            " tensor keeps its format, which takes its bytes over",
        )
    config = {"model_type": reader.value(Keys.General.ARCHITECTURE, str)}
    return Checkpoint(path, path.stem, None, config, tensors, reader.metadata(), notes)


def _second_scales(reader: GgufFile) -> dict[str, tuple[float, ...]]:
    """Of the tensors in NVFP4 that have them, by name without its end, the second-level scales of their matrices."""
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    found = {}
    for tensor in reader.tensors:
        stem = tensor.name.removesuffix(".weight")
        scale = by_name.get(f"{stem}.scale")
        if stem == tensor.name or tensor.ggml_type.name != "NVFP4" or scale is None:
            continue
        values = scale.decode(0, scale.n_rows).reshape(-1) if scale.ggml_type.name == "F32" else np.empty(0)
        if values.size != prod(tensor.shape[:-2]) or not np.isfinite(values).all():
            raise ConvertError(
                f"the scales of {tensor.name!r} are not one number for each of its matrices",
                f"{reader.path}: {scale.name}",
                "fetch or write the file again",
            )
        found[stem] = tuple(map(float, values))
    return found


def open_parts(path: Path) -> tuple[dict[str, GGUFValue], dict[str, EncodedTensor], list[TensorEntry]]:
    """What a GGUF file in one piece consists of, to lay it out anew: key-values, tensors by name, and their entries in
    the file's order. Raises ConvertError for one of several splits, and as read_gguf does."""
    reader = read_gguf(path)
    metadata = reader.metadata()
    if Keys.Split.LLM_KV_SPLIT_COUNT in metadata:
        raise ConvertError(
            "this is one of several splits of a model", str(path), "merge them: llama-gguf-split --merge"
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    entries = [TensorEntry(t.name, t.shape, int(t.ggml_type), t.n_bytes) for t in reader.tensors]
    return metadata, tensors, entries
