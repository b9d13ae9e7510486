"""What was measured of a source, kept for later conversions of the same weights."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bitwright.calibration.choices import Device
from bitwright.calibration.text.corpus import Corpus
from bitwright.converter.job.defaults import CACHE_BYTES
from bitwright.converter.job.identity import tool_identity
from bitwright.converter.job.job import Job
from bitwright.converter.job.progress import Progress
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import remove
from bitwright.formats.files.result_cache import Key, ResultCache
from bitwright.formats.files.whole import whole_file

T = TypeVar("T")

DIRECTORY_VARIABLE = "BITWRIGHT_CACHE"
"""The environment variable of --cache."""
OFF = "off"
RATES_FILE = "rates.jsonl"
"""What lies in the directory beside the entries: how fast this machine was, see converter.forecast.rates."""
# What the results depend on beside this tool: products, tokens, and the model's own code.
_PACKAGES = ("numpy", "tokenizers", "torch", "transformers")


def cache_directory(given: Path | None) -> Path | None:
    """Where the cache is: as given, as the environment says, or where caches are; None where it is switched off."""
    where = str(given) if given is not None else os.environ.get(DIRECTORY_VARIABLE)
    if where == OFF:
        return None
    if where:
        return Path(where).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bitwright"


def open_cache(directory: Path | None, most_bytes: int | None = None) -> ResultCache | None:
    """directory: as of cache_directory. most_bytes: None for the default. None where the cache is switched off."""
    found = cache_directory(directory)
    return None if found is None else ResultCache(found, most_bytes or CACHE_BYTES)


def clear_cache(opened: ResultCache) -> int:
    """Remove all that is kept there. Returns the bytes that were freed. Raises ConvertError."""
    rates = opened.directory / RATES_FILE
    freed = rates.stat().st_size if rates.is_file() else 0
    remove(rates)
    return freed + opened.clear()


def text_identity(corpus: Corpus) -> dict[str, Any]:
    """What of a text decides results."""
    return {**corpus.identity, "tokens": arrays_identity({"tokens": corpus.tokens})}


def arrays_identity(*kinds: Mapping[str, np.ndarray]) -> str:
    """A hash of arrays by name."""
    digest = hashlib.sha256()
    for arrays in kinds:
        for name, array in sorted(arrays.items()):
            digest.update(f"{name} {array.dtype} {array.shape} ".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class SourceCache:
    """The cache as far as one source goes. cache: None where it is switched off. device: that the model runs on."""

    cache: ResultCache | None
    source: Checkpoint
    device: Device
    progress: Progress

    @classmethod
    def of_job(cls, job: Job, source: Checkpoint, progress: Progress) -> "SourceCache":
        return cls(open_cache(job.cache, job.cache_size), source, job.device, progress)

    def entry(self, what: str, **settings: Any) -> "CachedResult":
        """The place of a result. what: in words. settings: what it depends on beside the source and the machine, as
        plain JSON data."""
        if self.cache is None:
            return CachedResult(None, what, {}, self.progress)
        key = {
            "result": what,
            "model": self.source.model_id,
            "revision": self.source.revision,
            "files": self.source.files(),
            "tool": tool_identity(),
            **machine_identity(self.device),
            **settings,
        }
        return CachedResult(self.cache, what, key, self.progress)

    def knows(self, what: str, samples: int, sequence_length: int) -> bool:
        """Whether there is such a result of this source over a text of this extent: most likely the one that is needed,
        which only the tokens tell for certain."""
        if self.cache is None:
            return False
        extent = {"samples": samples, "sequence_length": sequence_length}
        wanted: dict[str, object] = {"result": what, "model": self.source.model_id, "revision": self.source.revision}
        wanted |= {"files": [list(file) for file in self.source.files()], "tool": tool_identity()}
        for entry in self.cache.entries():
            text = entry.key.get("text")
            if wanted.items() <= entry.key.items() and isinstance(text, dict) and extent.items() <= text.items():
                return True
        return False

    def states(self, corpus: Corpus) -> "CachedResult":
        """The source's states over a text, see calibration.evaluation.quality.Baseline."""
        return self.entry("source states", text=text_identity(corpus))


@dataclass(frozen=True)
class CachedResult:
    """One result's place in the cache."""

    cache: ResultCache | None
    what: str
    key: Key
    progress: Progress

    def fetch(self, target: Path) -> bool:
        """Put the result at the target, a file or a directory that is not there yet, if it is in the cache."""
        if self.cache is None or not self.cache.fetch(self._kind, self.key, target):
            return False
        self.progress.say(f"{self.what}: from the cache, {self.cache.directory}")
        self.progress.reuse()
        return True

    def store(self, source: Path) -> None:
        """A cache that cannot be written to ends no job."""
        if self.cache is not None:
            try:
                if not self.cache.store(self._kind, self.key, source):
                    self.progress.say(f"{self.what}: too large for the cache, {self.cache.directory}: see --cache-size")
            except (ConvertError, OSError) as error:
                why = error.what if isinstance(error, ConvertError) else error.strerror
                self.progress.say(f"{self.what}: not kept in the cache, {self.cache.directory}: {why}")

    def result(
        self, compute: Callable[[], T], save: Callable[[Path, T], None], load: Callable[[Path], T], suffix: str = ""
    ) -> T:
        """What is in the cache, or what is computed, and is then. suffix: of the file that is saved and loaded."""
        if self.cache is None:
            return compute()
        with tempfile.TemporaryDirectory(prefix="bitwright-cache-") as directory:
            path = Path(directory) / f"result{suffix}"
            if not self.fetch(path):
                save(path, compute())
                self.store(path)
            return load(path)

    def json_result(self, compute: Callable[[], Any]) -> Any:
        """The same of plain data."""

        def save(path: Path, data: Any) -> None:
            with whole_file(path, self.what) as file:
                file.write(json.dumps(data).encode())

        return self.result(compute, save, lambda path: json.loads(path.read_bytes()))

    @property
    def _kind(self) -> str:
        return self.what.replace(" ", "_")


@cache
def machine_identity(device: Device) -> dict[str, Any]:
    """What of the machine and of the packages decides the last bits of a result."""
    import torch

    from bitwright.calibration.stream.build import choose_device

    chosen = choose_device(device)
    gpu = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else None
    return {
        "device": gpu or chosen.type,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "packages": {package: version(package) for package in _PACKAGES},
    }
