"""A checkpoint as a GGUF file in F32, written by gguf's own writer."""

from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from bitwright.converter.model.model_map import describe
from bitwright.converter.model.rope import FREQUENCIES
from bitwright.converter.model.stored_rows import read_rows
from bitwright.converter.source.open import open_checkpoint


def write_f32(
    directory: Path, path: Path, without: tuple[str, ...] = (), factors: tuple[float, ...] | None = None
) -> None:
    """All of the model map in F32, through gguf's own writer; but for the keys named, and with these rope factors."""
    checkpoint = open_checkpoint(str(directory))
    model_map = describe(checkpoint)
    writer = GGUFWriter(path, model_map.architecture)
    for key, value in model_map.metadata.items():
        if key not in ("general.architecture", *without):
            writer.add_key_value(key, value.value, value.type, value.sub_type)
    for spec in model_map.tensors:
        rows = read_rows(checkpoint, spec, 0, spec.n_rows).reshape(spec.shape)
        if factors is not None and spec.name == FREQUENCIES:
            rows = np.array(factors, np.float32)
        writer.add_tensor(spec.name, rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
