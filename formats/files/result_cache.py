"""A cache of results in a directory, one file an entry, which any number of processes share.

    KIND-HASH.entry     a line of JSON {"format", "key", "files": [[name, bytes, sha256], ...]}, then the files

The key says all that a result depends on, and is compared whole: a hash names the entry and decides nothing. An entry
gets its name when it is whole, and what is read of it is held against its hashes, so that one that is cut short,
damaged or another's is a miss. The name of a result that is one file is "". What was used longest ago goes first.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import file_sha256, make_directory, remove, remove_tree, rename
from bitwright.formats.files.whole import whole_file

Key = Mapping[str, Any]
"""Plain JSON data."""

_FORMAT = "bitwright cache 1"
_ENTRY = re.compile(r"([a-z_]+)-[0-9a-f]{32}\.entry")
_DRAFT = re.compile(r"draft-[0-9a-f]{32}|\.draft-[0-9a-f]{32}\.tmp")
_LARGEST_HEADER = 1 << 20
_CHUNK = 1 << 20
# An entry that takes more of the cache, or of the free disk, than this leaves too little to others.
_LARGEST_SHARE = 0.25


@dataclass(frozen=True)
class Entry:
    """n_bytes: on the disk. used: when it was written or read last, in seconds since 1970."""

    path: Path
    kind: str
    key: Key
    n_bytes: int
    used: float


class ResultCache:
    """A directory, which is made when the first entry is written, and the bytes that all entries together may take."""

    def __init__(self, directory: Path, most_bytes: int):
        self.directory, self.most_bytes = directory, most_bytes

    def fetch(self, kind: str, key: Key, target: Path) -> bool:
        """Write the entry of this key to the target, a file or a directory that is not there yet; False, and nothing at
        the target, where there is none that is sound. Raises ConvertError where the target cannot be written."""
        path = self._path(kind, key)
        try:
            with path.open("rb") as file:
                files = _header(file, path, key)
                _copy_out(file, files, target)
            os.utime(path)
        except FileNotFoundError:
            return False
        except (OSError, _Unsound):
            self._discard(path)
            return False
        return True

    def store(self, kind: str, key: Key, source: Path) -> bool:
        """Keep the file, or the files of the directory, under the key. False for what is too large for the cache, which
        is left out. Raises ConvertError where the cache cannot be written."""
        paths = sorted(p for p in source.iterdir() if p.is_file()) if source.is_dir() else [source]
        n_bytes = sum(path.stat().st_size for path in paths)
        make_directory(self.directory)
        room = min(self.most_bytes, shutil.disk_usage(self.directory).free)
        if n_bytes > _LARGEST_SHARE * room:
            return False
        draft = self.directory / f"draft-{uuid.uuid4().hex}"  # of this process alone
        try:
            with whole_file(draft, "cache entry") as file:
                names = ["" if path == source else path.name for path in paths]
                files = [(n, p.stat().st_size, file_sha256(p)) for n, p in zip(names, paths, strict=True)]
                file.write(json.dumps({"format": _FORMAT, "key": key, "files": files}).encode() + b"\n")
                for path in paths:
                    with path.open("rb") as part:
                        while data := part.read(_CHUNK):
                            file.write(data)
            rename(draft, self._path(kind, key))
        finally:
            remove(draft)
        self._shrink(self._path(kind, key))
        return True

    def entries(self) -> list[Entry]:
        """All entries whose beginning can be read, the one that was used last first."""
        entries = []
        for path in self._ours():
            named = _ENTRY.fullmatch(path.name)
            try:
                with path.open("rb") as file:
                    key = json.loads(file.readline(_LARGEST_HEADER))["key"]
                stat = path.stat()
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if named is not None and isinstance(key, dict):
                entries.append(Entry(path, named[1], key, stat.st_size, stat.st_mtime))
        return sorted(entries, key=lambda entry: -entry.used)

    def clear(self) -> int:
        """Remove all that is of this cache, and nothing else. Returns the bytes that were freed. Raises
        ConvertError."""
        freed = 0
        for path in self._ours():
            freed += _size(path)
            remove(path)
        return freed

    def _path(self, kind: str, key: Key) -> Path:
        text = json.dumps(key, sort_keys=True)
        return self.directory / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.entry"

    def _ours(self) -> list[Path]:
        """Entries, and drafts of processes that were killed or are at it."""
        if not self.directory.is_dir():
            return []
        paths = [path for path in self.directory.iterdir() if path.is_file() and not path.is_symlink()]
        return [path for path in paths if _ENTRY.fullmatch(path.name) or _DRAFT.fullmatch(path.name)]

    def _shrink(self, newest: Path) -> None:
        """Remove what was used longest ago until the rest fits. Another process may do so at the same time."""
        ages = []
        for path in self._ours():
            try:
                ages.append((path == newest, path.stat().st_mtime, path.stat().st_size, path))
            except FileNotFoundError:
                continue
        total = sum(size for _, _, size, _ in ages)
        for is_newest, _, size, path in sorted(ages):
            if total <= self.most_bytes or is_newest:
                return
            self._discard(path)
            total -= size

    def _discard(self, path: Path) -> None:
        """A cache that cannot be written to is still one to read."""
        with suppress(ConvertError):
            remove(path)


class _Unsound(Exception):
    """An entry is not what was written, or another's."""


def _header(file: BinaryIO, path: Path, key: Key) -> list[tuple[str, int, str]]:
    """The files of the entry that begins here: their names, sizes and hashes."""
    line = file.readline(_LARGEST_HEADER)
    try:
        header = json.loads(line)
        files = [(str(name), int(size), str(sha256)) for name, size, sha256 in header["files"]]
        sound = header["format"] == _FORMAT and header["key"] == json.loads(json.dumps(key))
    except (ValueError, KeyError, TypeError):
        raise _Unsound from None
    inside = all(name == Path(name).name and size >= 0 for name, size, _ in files)
    if not sound or not inside or len(line) + sum(size for _, size, _ in files) != path.stat().st_size:
        raise _Unsound
    return files


def _copy_out(file: BinaryIO, files: list[tuple[str, int, str]], target: Path) -> None:
    if [name for name, _, _ in files] == [""]:
        _copy_file(file, *files[0][1:], target)
        return
    draft = target.with_name(f".{target.name}.fetched")
    remove_tree(draft)
    make_directory(draft)
    try:
        for name, size, sha256 in files:
            _copy_file(file, size, sha256, draft / name)
        rename(draft, target)
    finally:
        remove_tree(draft)


def _copy_file(source: BinaryIO, size: int, sha256: str, target: Path) -> None:
    digest = hashlib.sha256()
    with whole_file(target, "copy of what is cached") as file:
        while size and (data := _read(source, min(size, _CHUNK))):
            digest.update(data)
            file.write(data)
            size -= len(data)
        if size or digest.hexdigest() != sha256:
            raise _Unsound


def _read(source: BinaryIO, size: int) -> bytes:
    try:
        return source.read(size)
    except OSError:
        raise _Unsound from None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
