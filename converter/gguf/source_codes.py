"""What a source that is quantized already brings for the format that is planned: its codes, or the scale of its grid.

Where a tensor of a GGUF has that format already, its rows are taken over as they are. Where a matrix of NVFP4 keeps the
scale that its source has, the encoder finds the same values again, as it does for MXFP4 and ternary matrices without
any help: no other scale has less error than none.
"""

from collections.abc import Sequence

import numpy as np

from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.formats.quantized.decoded_tensor import DecodedTensor
from bitwright.formats.quantized.ggml_rows import GgmlRows
from bitwright.formats.quantized.scaled import Nvfp4
from bitwright.profiles.planning.plan import PlannedTensor


def stored_rows(
    checkpoint: Checkpoint, planned: PlannedTensor, rows: range, scales: Sequence[float]
) -> np.ndarray | None:
    """Rows as the source has them in the format of the plan, uint8 [len(rows), row_bytes]; None where it has another,
    or where they are changed on the way. scales: the second-level ones that go with them."""
    spec = planned.tensor
    if checkpoint.metadata is None or len(spec.sources) != 1 or spec.rescaled or planned.pins:
        return None
    tensor = checkpoint.tensors[spec.sources[0]]
    if not isinstance(tensor, DecodedTensor) or not isinstance(tensor.decoder, GgmlRows):
        return None
    decoder = tensor.decoder
    if decoder.kind != planned.format or (decoder.tensor.scales and decoder.tensor.scales != tuple(scales)):
        return None
    return decoder.encoded(rows.start, rows.stop)


def stored_scales(checkpoint: Checkpoint, planned: PlannedTensor) -> list[float] | None:
    """The second-level scale of every matrix, of a tensor whose sources are all stored in NVFP4; None for others."""
    spec = planned.tensor
    if planned.format != "NVFP4" or spec.rescaled or not spec.sources:
        return None
    scales: list[float] = []
    for source in spec.sources:
        tensor = checkpoint.tensors[source]
        decoder = tensor.decoder if isinstance(tensor, DecodedTensor) else None
        if isinstance(decoder, Nvfp4):
            scales += [decoder.tensor_scale(source)] * (spec.n_matrices // len(spec.sources))
        elif isinstance(decoder, GgmlRows) and decoder.kind == "NVFP4":
            scales += decoder.tensor.scales or [1.0] * spec.n_matrices
        else:
            return None
    return scales
