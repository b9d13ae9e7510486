"""Models for every test: tiny random ones, and SmolLM2 as it is and 768 wide, built once in .cache."""

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from bitwright.converter.forecast import forecast, probe
from bitwright.converter.job.cache import DIRECTORY_VARIABLE, OFF
from scripts import smollm2 as real_model
from tests import tiny_models
from tests.tiny_architectures import ALL_TINY_MODELS

# Tests see what is computed, and what is computed again: those of the cache itself switch it on.
os.environ[DIRECTORY_VARIABLE] = OFF

_CACHE = Path(__file__).parent.parent / ".cache"


@pytest.fixture(scope="session", autouse=True)
def _brief_probes() -> Iterator[None]:
    """Forecasts measure for a moment, and each format once, where a conversion would for a second, each for itself:
    nothing but a forecast depends on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "_ENOUGH_SECONDS", 0.0)
        patch.setattr(forecast, "measured_encoding", cache(probe.measured_encoding))
        yield


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, rows of 576 and 1536."""
    return real_model.build(_CACHE / "smollm2")


@pytest.fixture(scope="session")
def smollm2_wide() -> Path:
    """The function-equivalent SmolLM2, rows of 768 and 1536."""
    return real_model.build(_CACHE / "smollm2-wide", wide=True)


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, switched on."""
    directory = tmp_path / "cache"
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(directory))
    return directory


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], Path]:
    """tiny("qwen3") is the directory of that tiny model (see tests/tiny_architectures.py); not to be written to."""
    return lambda name: tiny_models.checkpoint(name, ALL_TINY_MODELS[name])
