"""Compile every encoder once, so that numba's cache on disk is warm and no conversion waits for a compiler."""

import time

import numpy as np

from formats.registry import FORMATS
from formats.schemes import SCHEMES


def main() -> None:
    rows = np.linspace(-1, 1, 2048, dtype=np.float32).reshape(2, 1024)
    importance = np.linspace(0.5, 2, 1024, dtype=np.float32)
    start = time.monotonic()
    for block_format in FORMATS.values():
        for effort in ("best", "fast"):
            block_format.encode(rows, importance, effort)
            block_format.encode(rows, None, effort)
    for scheme in SCHEMES.values():
        scheme.encode(rows, importance)
    print(f"{len(FORMATS) + len(SCHEMES)} encoders are ready ({time.monotonic() - start:.1f} s)")


if __name__ == "__main__":
    main()
