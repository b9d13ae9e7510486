"""Error feedback: codes of a whole row that are chosen together, so that the errors of its weights cancel.

An encoder weighs the error of every weight for itself. But the inputs x of a layer are correlated: what the layer's
output loses is e H e, with e the errors of a row and H = mean(x x'), the second moments of its inputs. So the blocks
that an encoder has made are taken apart again (formats/parts.py), and their codes chosen anew under H:

1. Rounding in turn (GPTQ, Frantar et al. 2022; LDLQ, Chee et al. 2023). With H = L D L', L unit lower triangular,
   e H e = sum D (L' e)^2: positions are rounded from the last to the first, and a position's target is its weight plus
   what the errors of all positions behind it call for. Under scales that stay, any order will do: large second moments
   go first, while there are still many positions left that can make up for an error.
2. Descent (as QuantEase, Behdin et al. 2023, and beyond codes): each code, each stored scale and minimum and each d
   moves to its best value beside all others, in turn, until none does. Codebook formats move 8 weights at a time.
3. A row that was better as it came stays.

The level "quick" stops after the first step, where codes have more than 8 levels, and after one round of the second
otherwise; it compares with nothing.

H is damped: all its elements but the diagonal are made smaller by a share, as if the inputs had some noise of their
own in proportion. Otherwise directions that the samples happened to leave out would take up all errors.

Rows do not see each other, and no sum depends on which rows come together: the same bytes for any threads and chunks.
"""

import numpy as np

from bitwright.formats.choices import Effort, FeedbackLevel
from bitwright.formats.feedback.moment_factor import Factor, unit_of
from bitwright.formats.feedback.rows import PointRows, ScalarRows, search_of
from bitwright.formats.kernels.products import add_products
from bitwright.formats.parts import Blocked, PointBlocks

# Rows that are worked on together, so that the factor is read once for all of them.
_TILE = 256


def output_error(errors: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """e H e of each row: float64 [n_rows]. errors: float32 [n_rows, n]; matrix: float32 [n, n]."""
    gradient = np.zeros_like(errors)
    add_products(errors, matrix, 0, len(matrix), len(matrix), gradient)
    error: np.ndarray = (errors.astype(np.float64) * gradient).sum(axis=1)
    return error


def feed_back(
    block_format: Blocked,
    rows: np.ndarray,
    data: np.ndarray,
    factor: Factor,
    level: FeedbackLevel = "best",
    effort: Effort = "best",
    frozen: np.ndarray | None = None,
) -> np.ndarray:
    """Encoded rows with their codes chosen anew under the second moments of their inputs.

    rows: float32 [n_rows, n_columns], finite; data: uint8 [n_rows, row_bytes], what block_format.encode has made of
    them with factor.importance; frozen: bool [n_rows, blocks_per_row], blocks that keep their bytes.
    Returns data of the same shape. The bytes of a row depend on that row, its data and the factor alone.
    Raises ValueError for a factor of other columns or unit.
    """
    blocks = block_format.blocks
    if blocks is None or rows.shape[1] != len(factor.matrix) or factor.unit != unit_of(block_format):
        raise ValueError(f"{block_format.name} rows of {rows.shape[1]} columns, a factor of {len(factor.matrix)}")
    kept = np.zeros((len(rows), rows.shape[1] // block_format.block_size), bool) if frozen is None else frozen
    encoded, search = np.empty_like(data), search_of(blocks, level, effort)
    for start in range(0, len(rows), _TILE):
        tile = slice(start, start + _TILE)
        work = rows[tile], data[tile], kept[tile], factor, search
        chosen = PointRows(blocks, *work) if isinstance(blocks, PointBlocks) else ScalarRows(blocks, *work)
        encoded[tile] = chosen.choose()
    return encoded
