"""Compile encoders and error feedback once, so that numba's cache on disk is warm and no conversion waits for it."""

import time

import numpy as np

from bitwright.formats.feedback.choose import feed_back
from bitwright.formats.feedback.moment_factor import factorize, unit_of
from bitwright.formats.registry import FORMATS
from bitwright.formats.schemes.registry import SCHEMES


def main() -> None:
    rows = np.linspace(-1, 1, 2048, dtype=np.float32).reshape(2, 1024)
    importance = np.linspace(0.5, 2, 1024, dtype=np.float32)
    start = time.monotonic()
    for block_format in FORMATS.values():
        for effort in ("best", "fast"):
            block_format.encode(rows, importance, effort)
            block_format.encode(rows, None, effort)
    factors = {unit: factorize(np.eye(1024, dtype=np.float32), unit) for unit in (1, 8)}
    for block_format in FORMATS.values():
        if block_format.blocks is not None:
            factor = factors[unit_of(block_format)]
            feed_back(block_format, rows, block_format.encode(rows, factor.importance, "fast"), factor)
    for scheme in SCHEMES.values():
        scheme.encode(rows, importance)
    print(f"{len(FORMATS) + len(SCHEMES)} encoders are ready ({time.monotonic() - start:.1f} s)")


if __name__ == "__main__":
    main()
