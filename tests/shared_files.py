"""What tests make once and share: over workers, test modules and sessions, under a name of what it is made of."""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path

_ROOT = Path(__file__).parent.parent / ".cache" / "tests"
_KEPT_SECONDS = 7 * 24 * 3600


def shared(name: str, made_of: str, make: Callable[[Path], None]) -> Path:
    """The directory of this name that `make` has filled, not to be written to: whoever needs it first makes it, the
    others wait.

    made_of: all that the content depends on, beside these tests' own builders and the versions of their libraries. What
    nobody has asked for in a week goes when another of the name is made.
    """
    _ROOT.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(f"{_builders()} {made_of}".encode()).hexdigest()[:16]
    directory = _ROOT / f"{name}.{key}" / name
    if not directory.exists():
        with (_ROOT / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not directory.exists():
                _remove_old(name)
                unfinished = _ROOT / f"{name}.unfinished"
                shutil.rmtree(unfinished, ignore_errors=True)
                (unfinished / name).mkdir(parents=True)
                make(unfinished / name)
                unfinished.rename(directory.parent)
    os.utime(directory.parent)
    return directory


def _remove_old(name: str) -> None:
    for directory in _ROOT.glob(f"{name}.*/"):
        if directory.stat().st_mtime < time.time() - _KEPT_SECONDS:
            shutil.rmtree(directory)


@cache
def _builders() -> str:
    source = (Path(__file__).parent / "tiny_models.py").read_text()
    libraries = ("torch", "transformers", "tokenizers", "sentencepiece", "safetensors")
    return source + " ".join(f"{library} {version(library)}" for library in libraries)
