"""Error feedback in the stage `encode`: the factor of a matrix's inputs, and whether the matrix keeps what it bought.

Every matrix is encoded twice, with feedback and without. What its output loses on inputs that were held out of the
second moments decides: feedback is kept where that falls, and a matrix without held-out inputs is left without.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibration.second_moments import EXPERT_BYTES, SecondMoments, open_moments
from converter.job import Job
from converter.rescaling import rescale_moments
from converter.write import JOURNAL
from formats.block_format import BlockFormat, Effort
from formats.feedback import feed_back
from formats.journal import read_lines
from formats.moment_factor import Factor, factorize
from formats.pins import Pin
from formats.products import Run, add_products
from formats.registry import get_format
from profiles.plan import Plan, PlannedTensor
from profiles.vocabulary import ModelMap, Role

# Widths of loops over held-out rows.
_ROWS_AT_A_TIME = 4
# Roles that are fed the same, by what it is called here.
_SAME_INPUT = {
    **dict.fromkeys((Role.ATTENTION_QUERY, Role.ATTENTION_KEY, Role.ATTENTION_VALUE, Role.ATTENTION_QKV), "attention"),
    **dict.fromkeys((Role.MLP_GATE, Role.MLP_UP, Role.MLP_GATE_UP), "mlp"),
    **dict.fromkeys((Role.EXPERT_GATE, Role.EXPERT_UP), "experts"),
    **dict.fromkeys((Role.ROUTER, Role.SHARED_EXPERT_GATE, Role.SHARED_EXPERT_UP), "router"),
}


@dataclass(frozen=True)
class Outcome:
    """What feedback did for a matrix, on held-out inputs.

    plain_error, feedback_error: squared error of the output over its square; None where nothing could be measured.
    kept: the matrix is encoded with feedback. reason: why not, where it is not.
    """

    tensor: str
    matrix: int
    kept: bool
    plain_error: float | None = None
    feedback_error: float | None = None
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Inputs:
    """factor: of the second moments; held_out: float32 [n_columns, n_rows], inputs that are not in them."""

    factor: Factor
    held_out: np.ndarray


@dataclass(frozen=True, eq=False)
class Candidates:
    """Some rows in both encodings, uint8, and what is squared and summed over the outputs of both, and of the rows."""

    plain: np.ndarray
    fed: np.ndarray
    sums: np.ndarray


class Feedback:
    """The second moments in a directory, put to use. Not for two threads at once, but for `candidates`."""

    def __init__(self, directory: Path, effort: Effort):
        self.directory, self.effort = directory, effort
        self._moments: SecondMoments | None = None
        self._latest: tuple[tuple[str, int, bytes], Inputs] | None = None

    def inputs(
        self, tensor: str, matrix: int, unit: int, run: Run, factors: np.ndarray | None = None
    ) -> Inputs | Outcome:
        """What a matrix is fed, or why it gets no feedback.

        unit: as formats.moment_factor.unit_of; run: as for formats.products.cholesky. factors: float64 [n_columns], by
        which the inputs are multiplied first.
        """
        if self._moments is None:
            self._moments = open_moments(self.directory)
        group = self._moments.group(tensor, matrix)
        if group is None:
            return Outcome(tensor, matrix, False, reason="no second moments of its inputs")
        key = group, unit, b"" if factors is None else factors.tobytes()
        if self._latest is None or self._latest[0] != key:
            self._latest = None  # two at once may be too much
            moments = self._moments.load(group)
            if factors is not None:
                moments = rescale_moments(factors, moments)
            # Rows of zeros fill up, and add nothing.
            missing = -len(moments.held_out) % _ROWS_AT_A_TIME
            held_out = np.concatenate([moments.held_out, np.zeros((missing, len(moments.matrix)), np.float32)])
            self._latest = key, Inputs(factorize(moments.matrix, unit, run=run), np.ascontiguousarray(held_out.T))
        inputs = self._latest[1]
        if not inputs.held_out.any():
            return Outcome(tensor, matrix, False, reason="no inputs were held out to judge by")
        return inputs

    def candidates(
        self,
        block_format: BlockFormat,
        rows: np.ndarray,
        plain: np.ndarray,
        start: np.ndarray,
        inputs: Inputs,
        pins: Sequence[Pin] = (),
    ) -> Candidates:
        """rows: float32 [n_rows, n_columns], divided by their second-level scale where there is one; plain: encoded;
        start: encoded with inputs.factor.importance. The blocks of pins stay as they are in `plain`, and the codes of
        all others make up for what these lose, too."""
        frozen = np.zeros((len(rows), rows.shape[1] // block_format.block_size), bool)
        for pin in pins:
            frozen[pin.row, pin.column // block_format.block_size] = True
        start = np.where(np.repeat(frozen, block_format.type_size, axis=1), plain, start)
        fed = feed_back(block_format, rows, start, inputs.factor, self.effort, frozen)
        decoded = [block_format.decode(data) for data in (plain, fed)]
        return Candidates(plain, fed, output_squares(rows, decoded, inputs))

    def choose(
        self, planned: PlannedTensor, matrix: int, parts: Sequence[Candidates]
    ) -> tuple[Outcome, Iterator[np.ndarray]]:
        """What becomes of a matrix of which these are all rows, in order."""
        outcome = judge(planned.tensor.name, matrix, np.sum([part.sums for part in parts], axis=0))
        return outcome, (part.fed if outcome.kept else part.plain for part in parts)


def output_squares(rows: np.ndarray, decoded: Sequence[np.ndarray], inputs: Inputs) -> np.ndarray:
    """Of some rows what is squared and summed over the outputs on held-out inputs: of what each encoding loses, and of
    the rows themselves; float64 [n_encodings + 1]."""
    return np.array([_squares(array, inputs.held_out) for array in (*(rows - values for values in decoded), rows)])


def judge(tensor: str, matrix: int, sums: np.ndarray) -> Outcome:
    """What becomes of a matrix with these output_squares, of the plain encoding and of the one with feedback."""
    plain, fed, total = sums.tolist()
    kept, total = fed < plain, total or 1.0
    reason = "" if kept else "its output error on held-out inputs does not fall"
    return Outcome(tensor, matrix, kept, plain / total, fed / total, reason)


def moment_widths(model_map: ModelMap) -> dict[int, list[int]]:
    """The width of every input whose second moments are kept, by layer: the inputs that several roles have in common
    once, and those of the down projections of experts as many times as there are experts, where they fit."""
    inputs: dict[int, dict[tuple[str, int], int]] = defaultdict(dict)
    for tensor in model_map.tensors:
        if tensor.layer is None or not (tensor.quantizable or tensor.role is Role.ROUTER):
            continue
        own = tensor.role is Role.EXPERT_DOWN
        if own and tensor.n_matrices * tensor.n_columns**2 * 4 > EXPERT_BYTES:
            continue
        for matrix in range(tensor.n_matrices if own else 1):
            inputs[tensor.layer][_SAME_INPUT.get(tensor.role, tensor.name), matrix] = tensor.n_columns
    return {layer: list(widths.values()) for layer, widths in inputs.items()}


def wants_feedback(planned: PlannedTensor) -> bool:
    """Whether a tensor's format can take feedback, and is coarse enough for it to matter."""
    return planned.uses_importance and get_format(planned.format).blocks is not None


def feedback_notes(job: Job, plan: Plan, why: str) -> list[str]:
    """What to say of a plan whose job asked for error feedback in vain."""
    return [f"--error-feedback changes nothing: {why}"] if job.error_feedback and not plan.error_feedback else []


def feedback_report(job: Job, plan: Plan) -> dict[str, Any] | None:
    """The outcomes in the journal of encoded tensors, and what they come to; None for a plan without feedback.

    matrices, kept: how many; plain_error, feedback_error: means over the matrices that were measured, None without any;
    outcomes: one a matrix, in the order of the journal.
    """
    if not plan.error_feedback:
        return None
    assert job.work_dir is not None
    outcomes = _read_outcomes(job.work_dir / JOURNAL)
    measured = [outcome for outcome in outcomes if outcome["plain_error"] is not None]
    means = {
        key: sum(outcome[key] for outcome in measured) / len(measured) if measured else None
        for key in ("plain_error", "feedback_error")
    }
    kept = sum(outcome["kept"] for outcome in outcomes)
    return {"matrices": len(outcomes), "kept": kept, **means, "outcomes": outcomes}


def _read_outcomes(journal: Path) -> list[dict]:
    """Of a tensor encoded again the later ones."""
    found: dict[str, list[dict]] = {entry["tensor"]: entry.get("feedback", []) for entry in read_lines(journal)}
    return [outcome for outcomes in found.values() for outcome in outcomes]


def _squares(rows: np.ndarray, inputs: np.ndarray) -> float:
    """The sum of the squared products of rows float32 [n_rows, n] and inputs float32 [n, n_inputs]."""
    products = np.zeros((len(rows), inputs.shape[1]), np.float32)
    add_products(np.ascontiguousarray(rows, np.float32), inputs, 0, len(inputs), inputs.shape[1], products)
    return float(np.square(products, dtype=np.float64).sum())
