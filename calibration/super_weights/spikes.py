"""Where activations spike: what is looked at, the largest magnitudes that go into and come out of every matrix, and the
weights of down projections that make the spikes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from bitwright.calibration.statistics.super_weights import Criterion, LargestSpike, Place
from bitwright.calibration.stream.checkpointing import flat_arrays, load_flat_arrays
from bitwright.calibration.stream.device.totals import Maxima
from bitwright.formats.errors import ConvertError

SPIKE_RATIO = 15.0
"""A peak that many times the median of its matrix is a spike. Peaks of Gaussian activations reach 2, of ordinary
outlier channels 10; the published super weights make spikes of hundreds and thousands."""

LEAST_SHARE = 0.2
"""A candidate makes at least this share of its row's spike by itself: several may share one spike."""

LEAST_DIVERGENCE = 0.01
"""Nats per token, of a removal that confirms a candidate: what rounding all weights to 5 bits costs a model."""

LEAST_EXPECTED = 0.1 * LEAST_DIVERGENCE
"""The same as far as gradients tell, which fall short of what large changes cost."""

PROMPT_LENGTH = 32

PROMPTS = (
    "Apple Inc. is a worldwide tech company.",
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "1. Introduction\n\nIn this section we describe the data, the model and the results.\n\n",
    "Once upon a time there was a little girl who lived in a village near the forest.",
    "Le chat est assis sur la table; il regarde par la fenêtre et attend la pluie.",
    "Question: What is 17 times 23?\nAnswer: 391, because 17 * 20 + 17 * 3 = 340 + 51.\n",
    "北京是中国的首都。今天天气很好，我们去公园散步。",
)
"""Looked at in every model, beside samples of the calibration text: prose, code, lists, dialogue, other languages."""


@dataclass(frozen=True)
class DownProjection:
    """A checkpoint's tensor of down projections: one matrix, or all n_matrices experts of a layer, the first one being
    `matrix` of the GGUF tensor. transposed: the rows that are stored are the inputs' columns."""

    source: str
    layer: int
    tensor: str
    matrix: int
    n_matrices: int = 1
    transposed: bool = False

    def matrices(self, stored: np.ndarray) -> np.ndarray:
        """The stored values as [n_matrices, n_rows, n_columns] of the product."""
        matrices = stored.reshape(self.n_matrices, -1, stored.shape[-1])
        return matrices.transpose(0, 2, 1) if self.transposed else matrices

    def stored_at(self, k: int, row: int, column: int, shape: tuple[int, int]) -> tuple[int, int]:
        """The row over all of its matrices and the column at which the checkpoint has a weight of the k-th matrix;
        shape: n_rows and n_columns of the product."""
        return (k * shape[1] + column, row) if self.transposed else (k * shape[0] + row, column)


@dataclass(frozen=True)
class Candidate:
    """A weight that may be a super weight. source, stored_at: the checkpoint's tensor, and the row over all of its
    matrices and the column there. strength: the larger, the sooner it is tried; ratios and share as of SuperWeight.
    may_cost: whether it is tried at all, which gradients may speak against."""

    place: Place
    source: str
    stored_at: tuple[int, int]
    value: float
    strength: float
    found_by: Criterion
    row_ratio: float = 0.0
    column_ratio: float = 0.0
    share: float = 0.0
    may_cost: bool = True

    def expected(self, cost: float) -> "Candidate":
        """The same, whose removal is expected to cost as much, in nats per token to second order."""
        strength = self.strength + cost / LEAST_DIVERGENCE
        return replace(self, strength=strength, may_cost=cost >= LEAST_EXPECTED)


def prompt_tokens(tokenizer: Any, samples: np.ndarray, length: int = PROMPT_LENGTH) -> np.ndarray:
    """What is looked at: int32 [n, length], the fixed prompts and the beginnings of these samples, each with the
    beginning-of-sequence token in front and without it. A prompt that is too short is said again.

    tokenizer: transformers'. samples: int [n_samples, >= length], tokens of the calibration text.
    """
    begin = tokenizer.bos_token_id
    rows = []
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        rows.append((tokens * length)[:length])
    rows += [[token for token in sample[: length + 1].tolist() if token != begin][:length] for sample in samples]
    rows = [row for row in rows if len(row) == length]
    if begin is not None:
        rows += [[begin, *row[:-1]] for row in rows]
    return np.array(rows, np.int32)


class Peaks:
    """Per matrix the largest magnitude of every input column and of every output row, over all tokens.

    columns: parameter -> float32 [n_matrices, n_columns]; rows: parameter -> float32 [n_matrices, n_rows]; zeros for an
    expert that no token has reached. A product that is not computed is not seen.
    """

    def __init__(self) -> None:
        self._columns, self._rows = Maxima[str](), Maxima[str]()

    @property
    def columns(self) -> dict[str, np.ndarray]:
        return self._columns.host

    @property
    def rows(self) -> dict[str, np.ndarray]:
        return self._rows.host

    def fresh(self, first: int) -> "Peaks":
        return Peaks()

    def observe(
        self, parameter: str, matrix: int, n_matrices: int, inputs: torch.Tensor, outputs: torch.Tensor | None
    ) -> None:
        if outputs is None or not inputs.numel():
            return
        for peaks, values in ((self._columns, inputs), (self._rows, outputs)):
            largest = values.reshape(-1, values.shape[-1]).abs().amax(0).float()
            peaks.add(parameter, (n_matrices, len(largest)), matrix, largest)

    def move_to(self, device: torch.device) -> None:
        for peaks in (self._columns, self._rows):
            peaks.move_to(device)

    def merge(self, other: "Peaks") -> None:
        for peaks, others in ((self._columns, other._columns), (self._rows, other._rows)):
            _refuse_not_finite(others.host)
            peaks.merge(others)

    def to_arrays(self) -> dict[str, np.ndarray]:
        for peaks in (self._columns, self._rows):
            _refuse_not_finite(peaks.settle())
        return flat_arrays({"columns": self.columns, "rows": self.rows})

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        load_flat_arrays(arrays, {"columns": self.columns, "rows": self.rows})


def _refuse_not_finite(peaks: Mapping[str, np.ndarray]) -> None:
    for parameter, largest in peaks.items():
        if not np.isfinite(largest).all():
            raise ConvertError(
                "the model computes values that are not finite",
                f"the inputs or outputs of {parameter}",
                "check the weights; on a GPU try --device cpu, which computes in float32",
            )


def find_spikes(
    projection: DownProjection, k: int, weights: np.ndarray, row_peaks: np.ndarray, column_peaks: np.ndarray
) -> tuple[LargestSpike | None, list[Candidate]]:
    """The largest spike of the k-th matrix of a stored tensor, None where no token came by, and its candidates.

    weights: float32 [n_rows, n_columns]; row_peaks, column_peaks: largest outputs and inputs. The largest contribution
    that a weight ever makes to its row is its magnitude times its column's peak.
    """
    row_level, column_level = float(np.median(row_peaks)), float(np.median(column_peaks))
    if not row_level or not column_level:
        return None, []
    row_ratios, column_ratios = row_peaks / row_level, column_peaks / column_level

    def figures(row: int, column: int) -> tuple[float, float, float]:
        share = abs(weights[row, column]) * column_peaks[column] / row_peaks[row]
        return float(row_ratios[row]), float(column_ratios[column]), float(share)

    matrix, candidates = projection.matrix + k, []
    for row in np.flatnonzero(row_ratios >= SPIKE_RATIO).tolist():
        for column in np.flatnonzero(column_ratios >= SPIKE_RATIO).tolist():
            row_ratio, column_ratio, share = figures(row, column)
            if share >= LEAST_SHARE:
                place = Place(projection.layer, projection.tensor, matrix, row, column)
                stored_at = projection.stored_at(k, row, column, weights.shape)
                value, strength = float(weights[row, column]), row_ratio * share
                candidates.append(
                    Candidate(
                        place, projection.source, stored_at, value, strength, "spikes", row_ratio, column_ratio, share
                    )
                )
    row, column = int(row_ratios.argmax()), int(column_ratios.argmax())
    row_ratio, column_ratio, share = figures(row, column)
    spike = LargestSpike(projection.layer, projection.tensor, matrix, row, row_ratio, column, column_ratio, share)
    return spike, candidates
