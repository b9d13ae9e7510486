"""llama.cpp's own mixes of types, as its llama-quantize writes them: with fallbacks and all that depends on the model.

The tools come from the Makefile's .cache/llama.cpp, see scripts/peers/llama_cpp.py.
"""

import os
import subprocess
from pathlib import Path

from scripts.bench.kld import write_model

TOOLS = Path(".cache/llama.cpp")
FILE_TYPES = (
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "Q2_K_S", "Q2_K", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M"),
    *("Q3_K_S", "Q3_K_M", "Q3_K_L", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0"),
)
"""From the smallest to the largest."""


class Mixes:
    """The mixes of one model. imatrix: a GGUF of importance; directory: for its F16 file, which is as large as it."""

    def __init__(self, model: Path, imatrix: Path, directory: Path):
        if not (TOOLS / "llama-quantize").exists():
            raise SystemExit(f"llama-quantize is not in {TOOLS}: make {TOOLS}/llama-imatrix")
        self.imatrix = imatrix
        self.source = write_model(model, "F16", "F16", "best", None, directory)

    def write(self, file_type: str, output: Path, threads: int | None = None) -> Path:
        """The file of a mix. Raises SystemExit with what llama-quantize said where it fails."""
        command = [TOOLS / "llama-quantize", "--imatrix", self.imatrix, self.source, output, file_type]
        done = subprocess.run(
            [str(part) for part in (*command, threads or os.cpu_count() or 1)],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"llama-quantize to {file_type} failed:\n{done.stderr[-2000:]}")
        return output

    def close(self) -> None:
        self.source.unlink()
