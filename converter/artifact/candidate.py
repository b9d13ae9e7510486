"""An artifact as something to run: what is judged beside the source."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from bitwright.calibration.stream.arithmetic import Arithmetic
    from bitwright.calibration.stream.weights import WeightSource


@dataclass(frozen=True)
class Candidate:
    """The artifact as something to run: its weights under the checkpoint's names, decoded; arithmetic: how products
    with them are computed, None for as they are; artifact: what a runtime loads, a GGUF's first file or a directory;
    unreadable: why the runtime that is here does not read it, None where it should."""

    weights: "WeightSource"
    arithmetic: "Arithmetic | None" = None
    artifact: Path | None = None
    unreadable: str | None = None

    @property
    def runtime(self) -> Literal["llama.cpp", "transformers"]:
        """What the artifact is made for, or what stands in for it here: directories are vLLM's."""
        return "transformers" if self.artifact is not None and self.artifact.is_dir() else "llama.cpp"

    @property
    def gguf(self) -> Path | None:
        return self.artifact if self.runtime == "llama.cpp" else None
