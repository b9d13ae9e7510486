"""The grades of an artifact, of the text that it writes, and of its runtime's agreement with our evaluation, each from
best to worst."""

from typing import Final, Literal, get_args

Grade = Literal["near-lossless", "good", "fair", "lossy", "damaged"]
"""How near an artifact is to its source. With --strict the exit code is EXIT_CODE where it is "damaged"."""
GOOD: Final = "good"
LOSSY: Final = "lossy"
DAMAGED: Final = "damaged"
GRADES: tuple[Grade, ...] = get_args(Grade)

TextGrade = Literal["coherent", "noticeable", "severe", "failed"]
"""How the text that an artifact writes holds together, see converter.judge.guard.verdict."""

Agreeing = Literal["agrees", "differs", "disagrees"]
"""Whether the true runtime computes what our evaluation of the same artifact does: in all that was looked at; but for
what a runtime is known to do otherwise in places; or not."""
AGREES: Final = "agrees"
DIFFERS: Final = "differs"
DISAGREES: Final = "disagrees"
