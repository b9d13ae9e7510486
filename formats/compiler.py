"""numba's compiler for this project's kernels, with a cache on disk that is checked before it is believed.

numba unpickles whatever lies in its cache, and runs it: a file that a full disk cut short ends a job with a traceback,
and a flipped bit in machine code with anything. Here the index ends with the SHA-256 of what it holds, and names each
file of machine code by the SHA-256 of that. A file that does not fit is named, compiled again and replaced.

numba writes the index first, then machine code under a number that older code may have. A process that ends between
the two leaves an index that takes the old code for the new. Here the code is written first, under a name of its own.

numba asks the file of a kernel alone whether compiled code is still what the source says. But a kernel takes in the
helpers and constants it uses, wherever they are defined. So here all kernels are compiled again when the content of a
module has changed that has kernels, or that such a module imports from this package; and when gguf, whose tables
kernels hold, or numba has another version.
"""

# numba states no types of the classes that are extended here.
# mypy: disallow-untyped-calls=False

import functools
import inspect
import logging
import pickle
import re
from collections.abc import Callable, Iterator
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import numba
import numpy as np
from numba.core.caching import FunctionCache, IndexDataCacheFile

Array = np.ndarray
Real = np.float32
"""What kernels calculate with."""

Kernel = TypeVar("Kernel", bound=Callable[..., Any])

_LOG = logging.getLogger(__name__)
_DIGEST_BYTES = 32
_GGUF_VERSION = version("gguf")
_MENTION = re.compile(r"bitwright\.formats((?:\.\w+)*)(?:[ \t]+import\b([ \t]*\((?:[^)#]|#.*\n)*\)|.*))?")
"""A module by its full name, and what is imported from it, over several lines if in parentheses."""


def jit(function: Kernel) -> Kernel:
    """A kernel, compiled: without the interpreter's lock, in strict floating point, dividing by zero as numpy does."""
    return _compiled(function, "never")


def inlined(function: Kernel) -> Kernel:
    """The same for a helper that takes arrays: passed to a function each is counted as a reference, which takes as long
    as a trial of a search."""
    return _compiled(function, "always")


def _compiled(function: Kernel, inline: Literal["never", "always"]) -> Kernel:
    dispatcher: Any = numba.njit(nogil=True, cache=True, error_model="numpy", inline=inline)(function)
    dispatcher._cache = _CheckedCache(function)
    return cast(Kernel, dispatcher)


@functools.cache
def kernel_sources(root: Path = Path(__file__).parent) -> dict[str, str]:
    """The modules that have kernels, and what they import from this package, by path; each with the SHA-256 of it."""
    texts = {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in root.rglob("*.py")}
    paths = {f".{path.removesuffix('.py').replace('/', '.')}".removesuffix(".__init__"): path for path in texts}
    imports = {path: {paths[name] for name in _mentioned(text) if name in paths} for path, text in texts.items()}
    used: set[str] = set()
    new = {path for path, imported in imports.items() if "compiler.py" in imported}
    while new:
        used |= new
        new = set[str]().union(*(imports[path] for path in new)) - used
    return {path: sha256(texts[path].encode()).hexdigest() for path in sorted(used)}


def _mentioned(text: str) -> Iterator[str]:
    """The names below this package that a module's source imports, each with a dot before it.

    They may be too many, as names in prose count too, but not too few: only a relative import is not read, and this
    package has none. The syntax tree would say it exactly, but parsing it would delay every start by 0.1 s.
    """
    for module, names in _MENTION.findall(text.replace("\\\n", " ")):
        yield module
        for name in re.findall(r"\w+", names):
            yield f"{module}.{name}"


class _CheckedCache(FunctionCache):
    def __init__(self, function: Callable[..., Any]):
        super().__init__(function)
        # Under names of its own: what numba alone has left has no digests.
        name = f"{self._impl.filename_base}.hashed"
        own = sha256(Path(inspect.getfile(function)).read_bytes()).hexdigest()
        self._cache_file = _CheckedFile(self._cache_path, name, (own, _GGUF_VERSION, *kernel_sources().values()))

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """What the cache has; whoever listens is told where that is nothing, as compiling takes a while."""
        loaded = super().load_overload(sig, target_context)
        if loaded is None:
            _LOG.info("compiling %s", self._py_func.__qualname__)
        return loaded

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _LOG.warning("a compiled kernel is not kept: %s", error)


class _CheckedFile(IndexDataCacheFile):
    """The index begins with numba's version, then has the stamp of the source, then the data file of each overload."""

    def save(self, key: Any, data: Any) -> None:
        """The data first, then the index that names it: at no time does an index name the data of anything else."""
        overloads = self._load_index()
        content: bytes = super()._dump(data)
        prefix = self._index_name.removesuffix("nbi")
        overloads[key] = f"{prefix}{_digest(content).hex()}.nbc"
        with self._open_for_write(self._data_path(overloads[key])) as file:
            file.write(content)
        self._save_index(overloads)
        for path in Path(self._cache_path).glob("*.nbc"):
            if path.name.startswith(prefix) and path.name not in overloads.values():
                path.unlink(missing_ok=True)

    def _dump(self, obj: Any) -> bytes:
        data: bytes = super()._dump(obj)
        return data + _digest(pickle.dumps(self._version, protocol=-1) + data)

    def _load_index(self) -> dict[Any, str]:
        path = Path(self._index_path)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return {}
        if _digest(content[:-_DIGEST_BYTES]) != content[-_DIGEST_BYTES:]:
            _report(path)
            return {}
        return cast(dict[Any, str], super()._load_index())

    def _load_data(self, name: str) -> Any:
        path = Path(self._data_path(name))
        if not name.endswith(f".{_digest(path.read_bytes()).hex()}.nbc"):
            _report(path)
            raise FileNotFoundError(path)  # which numba takes for what it is: nothing to load
        return super()._load_data(name)


def _digest(content: bytes) -> bytes:
    return sha256(content).digest()


def _report(path: Path) -> None:
    _LOG.warning("%s is damaged; the kernel is compiled again, and the file replaced", path)
