"""Which tiny models are converted, and where what comes of them differs from transformers or llama.cpp, and why."""

import tomllib
from pathlib import Path
from typing import Any

from tests.tiny_architectures import ALL_TINY_MODELS

EXCEPTIONS: dict[str, Any] = tomllib.loads((Path(__file__).parent / "exceptions.toml").read_text())

REFUSED: dict[str, str] = EXCEPTIONS["refused"]
"""Names of tiny models that cannot be converted, with a regular expression of the message."""

CONVERTED = [name for name in ALL_TINY_MODELS if name not in REFUSED]
