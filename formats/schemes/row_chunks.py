"""The rows of a matrix in parts: in turn, or on several threads, each for itself, so that no byte depends on their
number."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

CHUNK_WEIGHTS = 1 << 18


def row_spans(n_rows: int, n_columns: int, n_weights: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """(first row, the one after the last) of consecutive parts of about n_weights weights, of `multiple` rows or some
    times that many."""
    step = max(1, n_weights // (n_columns * multiple)) * multiple
    return ((start, min(start + step, n_rows)) for start in range(0, n_rows, step))


def for_row_chunks(
    n_rows: int, n_columns: int, n_threads: int, work: Callable[[slice], None], multiple: int = 1
) -> None:
    """Calls work(rows) for consecutive slices of rows, as row_spans has them.

    The slices depend on the shape alone. work has to release the GIL to gain from threads.
    """
    chunks = [slice(*span) for span in row_spans(n_rows, n_columns, CHUNK_WEIGHTS, multiple)]
    if n_threads == 1 or len(chunks) == 1:
        for chunk in chunks:
            work(chunk)
        return
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in pool.map(work, chunks):
            pass
