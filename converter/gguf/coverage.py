"""Whether an artifact has kept its super weights."""

import math
from pathlib import Path
from typing import Any

from bitwright.calibration.statistics.super_weights import SuperWeight, SuperWeightReport
from bitwright.converter.artifact.super_weights import DecodedWeight, coverage
from bitwright.converter.gguf.verify import artifact_tensors
from bitwright.profiles.vocabulary import ModelMap


def gguf_coverage(
    report: SuperWeightReport | None, paths: list[Path], model_map: ModelMap, tolerance: float
) -> dict[str, Any] | None:
    """How many confirmed super weights come out of the artifact, decoded by the `gguf` package, within the tolerance:
    plain data; None where nobody has looked for them.

    A weight of a rescaled column counts as the network uses it, its factor made up for.
    """
    stored = artifact_tensors(paths) if report is not None else {}

    def decode(weight: SuperWeight) -> DecodedWeight:
        spec = model_map.tensor(weight.tensor)
        row = weight.matrix * (spec.n_rows // spec.n_matrices) + weight.row
        back = 1 / math.prod(
            part.factor
            for part in spec.rescaled
            if part.axis == "column" and (part.matrix, part.index) == (weight.matrix, weight.column)
        )
        decoded = float(stored[weight.tensor].decode(row, row + 1)[0, weight.column]) * back
        return DecodedWeight(weight.tensor, weight.matrix, weight.row, weight.column, weight.value, decoded)

    return coverage(report, decode, tolerance)
