"""Sizes in bytes, as people write them: in binary units where we write, in either kind where we read."""

import re

from bitwright.formats.errors import ConvertError

_PREFIXES = ("", "K", "M", "G", "T")
_SIZE = re.compile(r"([0-9.]+)\s*([KMGT]?)(i?)B?", re.IGNORECASE | re.ASCII)


def size_text(n_bytes: float) -> str:
    """Bytes in the largest binary unit that leaves a number of at least one: 1.50 GiB."""
    for prefix in _PREFIXES[:-1]:
        if abs(n_bytes) < 1024:
            return f"{n_bytes:.2f} {prefix}iB" if prefix else f"{n_bytes:.0f} B"
        n_bytes /= 1024
    return f"{n_bytes:.2f} TiB"


def parse_size(text: str, where: str) -> int:
    """Bytes from a text such as 500M, 20GB or 1.5GiB: decimal units, binary ones with an i. Raises ConvertError for
    what is no positive number in one of them."""
    match = _SIZE.fullmatch(text.strip())
    try:
        amount = float(match[1]) if match else 0.0
    except ValueError:  # such as 1.2.3
        amount = 0.0
    if match is None or not 0 < amount < 1e18:
        raise ConvertError(f"{text!r} is no size", where, "write for example 500M, 20GB or 1.5GiB")
    base = 1024 if match[3] else 1000
    return int(amount * base ** _PREFIXES.index(match[2].upper()))
