"""What every block encoder does before its kernel runs: check the rows, and give each block its importance."""

import numpy as np

from bitwright.formats.errors import ConvertError

SMALLEST_WEIGHT = np.float32(1e-8)


def to_blocks(rows: np.ndarray, importance: np.ndarray | None, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows and their importance, cut into blocks.

    rows: float32 [n_rows, n_columns], C-contiguous; importance: float32 [n_columns] or None.
    Returns blocks float32 [n_rows * blocks_per_row, block_size], a read-only view of rows, and their weights
    float32 [blocks_per_row, block_size]; block b is weighted by weights[b % blocks_per_row].
    A block's weights are divided by their maximum, which moves no optimum and keeps sums of squares inside float32. A
    block in which nothing is important (or no importance is given) weighs all its columns alike. Beside important
    columns an unimportant one keeps SMALLEST_WEIGHT: too little to be seen in a sum, enough to decide between equals.

    Raises ConvertError for a weight that is not finite (naming row and column) or an importance that is negative or
    not finite (naming the column); the caller adds the tensor's name. Raises ValueError for a wrong dtype or shape.
    """
    check_rows(rows, block_size)
    blocks = rows.reshape(-1, block_size)
    # Numba compiles anew for arrays that may be written; rows mapped from a file never may.
    blocks.flags.writeable = False
    if importance is None:
        return blocks, np.ones((rows.shape[1] // block_size, block_size), np.float32)
    check_importance(importance, rows.shape[1])
    weights = importance.reshape(-1, block_size)
    largest = weights.max(axis=1, keepdims=True)
    # A largest weight below float32's normal range would lose its digits in the division.
    weighted = largest >= np.finfo(np.float32).tiny
    normalized = np.divide(weights, largest, out=np.ones_like(weights), where=weighted)
    return blocks, np.maximum(normalized, SMALLEST_WEIGHT)


def check_rows(rows: np.ndarray, block_size: int) -> None:
    """Refuses rows that no encoder may see; arguments and errors as for to_blocks."""
    if rows.ndim != 2 or rows.dtype != np.float32 or not rows.flags.c_contiguous:
        raise ValueError(f"rows must be C-contiguous float32 [n_rows, n_columns], not {rows.dtype} {rows.shape}")
    if rows.shape[1] == 0 or rows.shape[1] % block_size:
        raise ValueError(f"{rows.shape[1]} columns are no positive multiple of the block size {block_size}")
    check_finite(rows)


def check_finite(rows: np.ndarray, first_row: int = 0) -> None:
    """Raises ConvertError, naming row and column, for a weight of float32 [n_rows, n_columns] that is not finite.
    first_row: what the first of these is counted as."""
    # Minimum and maximum need no temporary array, and a NaN passes through both.
    if not (np.isfinite(rows.min(initial=0.0)) and np.isfinite(rows.max(initial=0.0))):
        row, column = np.argwhere(~np.isfinite(rows))[0]
        raise ConvertError(
            f"the weight {rows[row, column]} is not a finite number",
            f"row {first_row + row}, column {column}",
            "the checkpoint is damaged: download it again, or ask its author for a sound one",
        )


def check_importance(importance: np.ndarray, n_columns: int) -> None:
    """Refuses an importance that no encoder may see; arguments and errors as for to_blocks."""
    if importance.shape != (n_columns,) or importance.dtype != np.float32 or not importance.flags.c_contiguous:
        raise ValueError(f"importance must be float32 [{n_columns}], not {importance.dtype} {importance.shape}")
    if not (importance.min() >= 0 and np.isfinite(importance.max())):
        column = np.argwhere(~(np.isfinite(importance) & (importance >= 0)))[0, 0]
        raise ConvertError(
            f"the importance {importance[column]} is not a finite number of at least 0",
            f"column {column}",
            "the importance matrix is damaged: calibrate again, or convert without --imatrix",
        )
