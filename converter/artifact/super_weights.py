"""Whether an artifact has kept its super weights: the same question of either kind of artifact."""

from collections.abc import Callable
from typing import Any, NamedTuple

from bitwright.calibration.statistics.super_weights import SuperWeight, SuperWeightReport


class DecodedWeight(NamedTuple):
    """A super weight as an artifact has it: its place in the artifact's own terms, the value that was encoded, and the
    value that comes out."""

    tensor: str
    matrix: int
    row: int
    column: int
    value: float
    decoded: float


def coverage(
    report: SuperWeightReport | None, decode: Callable[[SuperWeight], DecodedWeight], tolerance: float
) -> dict[str, Any] | None:
    """How many confirmed super weights come out of the artifact within the tolerance: plain data; None where nobody has
    looked for them."""
    if report is None:
        return None
    rows = []
    for weight in map(decode, report.weights):
        error = abs(weight.decoded - weight.value) / abs(weight.value)
        rows.append({**weight._asdict(), "relative_error": error, "within": error <= tolerance})
    return {
        "confirmed": len(rows),
        "within": sum(row["within"] for row in rows),
        "tolerance": tolerance,
        "weights": rows,
    }
