"""Encoding a matrix on several threads: every chunk of rows for itself, so that no byte depends on their number."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

CHUNK_WEIGHTS = 1 << 18


def for_row_chunks(
    n_rows: int, n_columns: int, n_threads: int, work: Callable[[slice], None], multiple: int = 1
) -> None:
    """Calls work(rows) for consecutive slices of rows, of `multiple` rows or some times that many.

    The slices depend on the shape alone. work has to release the GIL to gain from threads.
    """
    step = max(1, CHUNK_WEIGHTS // (n_columns * multiple)) * multiple
    chunks = [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]
    if n_threads == 1 or len(chunks) == 1:
        for chunk in chunks:
            work(chunk)
        return
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in pool.map(work, chunks):
            pass
