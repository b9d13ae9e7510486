"""`bitwright ADAPTER --lora-gguf`: a LoRA adapter as a GGUF of its own, which llama.cpp adds to a GGUF of its base.

Of every adapted matrix there are two tensors, in the type of ggml's products (shapes slowest dimension first):

    NAME.lora_a   F32  [r, n_inputs]
    NAME.lora_b   F32  [n_outputs, r]     its rows in the order of the GGUF's matrix

and of the token embedding [n_tokens, r] and [n_columns, r]. llama.cpp multiplies the product by adapter.lora.alpha / r;
what an adapter's own scale differs from that is in lora_b.
"""

from collections import defaultdict
from pathlib import Path

import numpy as np
from gguf import GGUFValueType, Keys
from gguf.gguf_writer import GGUFValue

from bitwright.converter.model.model_map import describe
from bitwright.converter.source.lora.merged_tensor import LowRank
from bitwright.converter.source.open import open_adapter_of
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.gguf import TensorEntry, lay_out, padded
from bitwright.formats.files.whole import whole_file
from bitwright.profiles.vocabulary import Role, TensorSpec

_F32 = 0  # ggml's id of the type


def write_lora_gguf(model: str, base: str | None = None, output: Path | None = None) -> Path:
    """The path of what was written. model: an adapter; base: its model, None for the one that it states; output: None
    for the adapter's name with "-lora.gguf" in the current directory.

    Raises ConvertError for an adapter that llama.cpp cannot add: one with DoRA, with whole modules, or of matrices that
    a GGUF stacks; and for an output that exists.
    """
    adapter, checkpoint = open_adapter_of(model, base, metadata_only=True)
    output = output or Path(f"{adapter.directory.resolve().name}-lora.gguf")
    if output.exists():
        raise ConvertError("there is something at the output already", str(output), "take it away, or name another")
    model_map = describe(checkpoint)
    by_source: dict[str, list[TensorSpec]] = defaultdict(list)
    for spec in model_map.tensors:
        for source in spec.sources:
            by_source[source].append(spec)
    stated = adapter.config.get("lora_alpha")
    alpha = float(stated) if isinstance(stated, int | float) and stated > 0 else 1.0
    tensors: dict[str, np.ndarray] = {}
    for source, low_rank in adapter.low_ranks(checkpoint).items():
        specs = by_source[source]
        if not specs or any(not _is_addable(spec, low_rank) for spec in specs):
            raise adapter.unusable(
                f"{source!r} is part of a tensor of the GGUF that llama.cpp adds nothing to",
                "merge it: the same command without --lora-gguf",
            )
        if low_rank.magnitude is not None:
            raise adapter.unusable(
                "llama.cpp knows no lengths of rows (DoRA)", "merge it: the same command without --lora-gguf"
            )
        for spec in specs:
            tensors |= _pair(spec, source, low_rank, alpha)
    metadata = {
        Keys.General.ARCHITECTURE: GGUFValue(model_map.architecture, GGUFValueType.STRING),
        Keys.General.TYPE: GGUFValue("adapter", GGUFValueType.STRING),
        Keys.General.NAME: GGUFValue(adapter.directory.resolve().name, GGUFValueType.STRING),
        Keys.Adapter.TYPE: GGUFValue("lora", GGUFValueType.STRING),
        Keys.Adapter.LORA_ALPHA: GGUFValue(alpha, GGUFValueType.FLOAT32),
    }
    entries = [TensorEntry(name, values.shape, _F32, values.nbytes) for name, values in tensors.items()]
    (layout,) = lay_out(output.name, metadata, entries)
    with whole_file(output, "LoRA adapter") as file:
        file.write(layout.header)
        for values in tensors.values():
            data = np.ascontiguousarray(values, "<f4").tobytes()
            file.write(data + bytes(padded(len(data)) - len(data)))
    return output


def _is_addable(spec: TensorSpec, low_rank: LowRank) -> bool:
    """Whether the tensor is one matrix, whose rows are the outputs of the product that is adapted."""
    layout = spec.layout
    if len(spec.shape) != 2 or len(spec.sources) != 1 or layout.values != "same" or not layout.observed:
        return False
    return spec.role is Role.EMBEDDING or layout.transposed == low_rank.sideways


def _pair(spec: TensorSpec, source: str, low_rank: LowRank, alpha: float) -> dict[str, np.ndarray]:
    a = low_rank.a.rows(source, 0, low_rank.a.n_rows)
    b = low_rank.b.rows(source, 0, low_rank.b.n_rows)
    b = b * np.float32(low_rank.scale * len(a) / alpha)
    outputs, inputs = spec.layout.rows, spec.layout.columns
    if low_rank.sideways:
        outputs, inputs = inputs, outputs
    a = a if inputs is None else a[:, inputs.indices()]
    b = b if outputs is None else b[outputs.indices()]
    if spec.role is Role.EMBEDDING:
        a = a.T
    return {f"{spec.name}.lora_a": a, f"{spec.name}.lora_b": b}
