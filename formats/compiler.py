"""numba's compiler for this project's kernels, with a cache on disk that is checked before it is believed.

numba unpickles whatever lies in its cache, and runs it: a file that a full disk cut short ends a job with a traceback,
and a flipped bit in machine code with anything. Here every file ends with the SHA-256 of what it holds. One that does
not fit is named, compiled again and replaced.
"""

import logging
import pickle
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile

_LOG = logging.getLogger(__name__)
_DIGEST_BYTES = 32


def njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """numba's decorator of that name, with options and cache=True among them, whose cache is a checked one."""

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(**options)(function)
        dispatcher._cache = _CheckedCache(function)
        return dispatcher

    return decorate


class _CheckedCache(FunctionCache):
    def __init__(self, function: Callable[..., Any]):
        super().__init__(function)
        # Under names of its own: what numba alone has left has no digests.
        name = f"{self._impl.filename_base}.checked"
        self._cache_file = _CheckedFile(self._cache_path, name, self._impl.locator.get_source_stamp())

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _LOG.warning("a compiled kernel is not kept: %s", error)


class _CheckedFile(IndexDataCacheFile):
    """The index begins with numba's version, of which the digest says nothing: another one's index counts as none."""

    def _dump(self, obj: Any) -> bytes:
        data = super()._dump(obj)
        return data + sha256(data).digest()

    def _load_index(self) -> dict[Any, str]:
        path, version = Path(self._index_path), pickle.dumps(self._version, protocol=-1)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return {}
        if not _is_sound(content.removeprefix(version)):
            _name(path)
            return {}
        return super()._load_index() if content.startswith(version) else {}

    def _load_data(self, name: str) -> Any:
        path = Path(self._data_path(name))
        if not _is_sound(path.read_bytes()):
            _name(path)
            raise FileNotFoundError(path)  # which numba takes for what it is: nothing to load
        return super()._load_data(name)


def _is_sound(content: bytes) -> bool:
    return sha256(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]


def _name(path: Path) -> None:
    _LOG.warning("%s is damaged; the kernel is compiled again, and the file replaced", path)
