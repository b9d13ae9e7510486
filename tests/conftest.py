"""Models for every test: tiny random ones, and SmolLM2 as it is and 768 wide, built once in .cache."""

from collections.abc import Callable
from pathlib import Path

import pytest

from scripts import smollm2 as real_model
from tests import tiny_models

_CACHE = Path(__file__).parent.parent / ".cache"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, rows of 576 and 1536."""
    return real_model.build(_CACHE / "smollm2")


@pytest.fixture(scope="session")
def smollm2_wide() -> Path:
    """The function-equivalent SmolLM2, rows of 768 and 1536."""
    return real_model.build(_CACHE / "smollm2-wide", wide=True)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Callable[[str], Path]:
    """tiny("qwen3") is the directory of that tiny model (see tests/tiny_models.py); not to be written to."""
    root = tmp_path_factory.mktemp("tiny")

    def build(name: str) -> Path:
        directory = root / name
        if not directory.exists():
            tiny_models.build(name, directory)
        return directory

    return build
