"""A model that can be streamed: its weights, what tells them from others, and how they are computed with."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bitwright.calibration.choices import Dtype

if TYPE_CHECKING:
    from bitwright.calibration.stream.arithmetic import Arithmetic
    from bitwright.calibration.stream.weights import WeightSource


@dataclass(frozen=True, eq=False)
class StreamableModel:
    """What every pass over a model is given.

    weights: where they are read from, a layer at a time. config_dir: a directory with config.json.
    name, revision: of the source model, None where it has none. variant: what tells the weights from those of that
    name and revision, such as a hash of the factors that they are smoothed with; "" for nothing. A checkpoint of
    another identity is refused.
    device: "auto", "cpu", "cuda" or "mps". dtype: of weights and hidden states; "auto" is bfloat16 on cuda and float32
    elsewhere. threads: of the CPU, None for one a core; no result depends on their number. arithmetic: how products
    with matrices are computed and caches kept, None for as torch does it.
    """

    weights: "WeightSource"
    config_dir: Path
    name: str | None = None
    revision: str | None = None
    variant: str = ""
    device: str = "auto"
    dtype: Dtype = "auto"
    threads: int | None = None
    arithmetic: "Arithmetic | None" = None

    @property
    def identity(self) -> str:
        """What tells the weights from others of the same shapes."""
        return f"{self.name}@{self.revision} {self.variant}".rstrip()
