"""Names of files: made of text that a model brings along, or of another file's name."""

import hashlib
import os
import re
import unicodedata
from pathlib import Path

LONGEST_NAME = 255
"""Bytes of a file's name at most, in every file system that models are kept in."""

# Of a name that is too long, this much of its end stays: what tells apart, such as the encoding, stands there.
_KEPT_END = 48
# Separators of some system, and what Windows refuses in a name.
_FORBIDDEN = frozenset('/\\<>:"|?*')
# Unicode categories of what no terminal shows as it is: control, format, surrogate, line and paragraph separators.
_INVISIBLE = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])\s*(\.|$)", re.IGNORECASE)


def safe_name(text: str, longest: int = LONGEST_NAME) -> str:
    """The text as the name, or a part of the name, of a file, wherever it comes from: one name in one directory on
    every system, no option of a command and no hidden file, of at most that many bytes; "" where nothing of it is left.

    Separators, control characters and what Windows forbids become "-". The same text gives the same name.
    """
    kept = "".join("-" if c in _FORBIDDEN or unicodedata.category(c) in _INVISIBLE else c for c in text)
    kept = shortened(kept.lstrip(".-~ ").rstrip(". "), longest - 1)
    return f"_{kept}" if _RESERVED.match(kept) else kept


def is_text(name: str) -> bool:
    """Whether it can be written as UTF-8, as what is said of a model is: half of a surrogate pair cannot, and in Python
    a file's name that is no UTF-8 has such halves."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(name: str) -> str:
    """The same in one line, with escapes for what is no text and for what a terminal obeys or hides."""
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in _INVISIBLE else c for c in name)


def shortened(name: str, longest: int) -> str:
    """The name where it has at most that many bytes; else its beginning and its end, and between them a hash of all of
    it, so that no two names become one."""
    data = os.fsencode(name)
    if len(data) <= longest:
        return name
    middle = b"-" + hashlib.sha256(data).hexdigest()[:12].encode() + b"-"
    end = min(_KEPT_END, max(0, longest - len(middle)) // 2)
    parts = data[: longest - len(middle) - end], middle, data[len(data) - end :]
    return "".join(part.decode(errors="ignore") for part in parts)


def hidden_path(path: Path, ending: str) -> Path:
    """.NAME.ENDING beside the path: where something of it is kept for a while; a long name is shortened."""
    return path.with_name(f".{shortened(path.name, LONGEST_NAME - len(ending) - 2)}.{ending}")
