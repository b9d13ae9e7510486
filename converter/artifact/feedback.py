"""Error feedback in the stage `encode`: the factor of a matrix's inputs, and whether the matrix keeps what it bought.

Every matrix is encoded twice, with feedback and without. What its output loses on inputs that were held out of the
second moments decides: feedback is kept where that falls, and a matrix without held-out inputs is left without.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.calibration.statistics.second_moments import EXPERT_BYTES, SecondMoments, open_moments
from bitwright.converter.artifact.run import Run
from bitwright.converter.artifact.writer import JOURNAL
from bitwright.converter.model.rescaled import input_factors, rescale_moments
from bitwright.converter.source.smoothed import Folding
from bitwright.formats.block_format import BlockFormat
from bitwright.formats.choices import Effort, FeedbackLevel
from bitwright.formats.feedback.choose import feed_back
from bitwright.formats.feedback.moment_factor import Factor, factorize
from bitwright.formats.files.journal import read_lines
from bitwright.formats.kernels.products import Run as RunInParallel
from bitwright.formats.kernels.products import add_products
from bitwright.formats.pins import Pin
from bitwright.formats.registry import get_format
from bitwright.profiles.planning.plan import Plan, PlannedTensor
from bitwright.profiles.vocabulary import ModelMap, Role, TensorSpec

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
    """The second moments in a directory, put to use. Not for two threads at once, but for `candidates`.

    foldings: what has been folded into the checkpoint that is encoded, and not into the one that the moments are of.
    """

    def __init__(
        self, directory: Path, level: FeedbackLevel, effort: Effort, foldings: Mapping[str, Folding] | None = None
    ):
        self.directory, self.level, self.effort, self.foldings = directory, level, effort, foldings or {}
        self._moments: SecondMoments | None = None
        self._latest: tuple[tuple[str, int, bytes], Inputs] | None = None

    def factors(self, spec: TensorSpec, matrix: int) -> np.ndarray | None:
        """By what the inputs of a tensor's matrix are multiplied, float64 [n_columns]; None for nothing."""
        rescaled = input_factors(spec, matrix)
        source = spec.sources[matrix * len(spec.sources) // spec.n_matrices] if spec.sources else ""
        folded = self.folded(source)
        return rescaled if folded is None else folded if rescaled is None else folded * rescaled

    def folded(self, source: str) -> np.ndarray | None:
        """By what folding multiplies the inputs of a checkpoint's matrix, as of `factors`."""
        folding = self.foldings.get(source)
        return None if folding is None or folding.columns is None else 1 / folding.columns.astype(np.float64)

    def inputs(
        self, tensor: str, matrix: int, unit: int, run: RunInParallel, factors: np.ndarray | None = None
    ) -> Inputs | Outcome:
        """What a matrix is fed, or why it gets no feedback.

        unit: as moment_factor.unit_of; run: as for products.cholesky. factors: float64 [n_columns], by
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
        fed = feed_back(block_format, rows, start, inputs.factor, self.level, self.effort, frozen)
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


def feedback_notes(run: Run, plan: Plan, why: str, takes: bool) -> list[str]:
    """What to say of a plan whose job asked for error feedback in vain, or does without as no pass over the model would
    bring the second moments along.

    why: it would change nothing. takes: some matrix of the plan can take it.
    """
    job = run.job
    if plan.error_feedback is not None or job.error_feedback == "off":
        return []
    if job.feedback_is_asked_for:
        return [f"--error-feedback changes nothing: {why}"]
    if not takes:
        return []
    return [
        "codes are chosen without error feedback, for which the model would have to run once more:"
        " ask for it with --error-feedback quick"
    ]


def feedback_report(run: Run, plan: Plan) -> dict[str, Any] | None:
    """The outcomes in the journal of encoded tensors, and what they come to; None for a plan without feedback.

    matrices, kept: how many; plain_error, feedback_error: means over the matrices that were measured, None without any;
    outcomes: one a matrix, in the order of the journal.
    """
    if not plan.error_feedback:
        return None
    outcomes = _read_outcomes(run.work_dir / JOURNAL)
    measured = [outcome for outcome in outcomes if outcome["plain_error"] is not None]
    means = {
        key: sum(outcome[key] for outcome in measured) / len(measured) if measured else None
        for key in ("plain_error", "feedback_error")
    }
    kept = sum(outcome["kept"] for outcome in outcomes)
    return {"matrices": len(outcomes), "kept": kept, **means, "outcomes": outcomes}


def _read_outcomes(journal: Path) -> list[dict[str, Any]]:
    """Every matrix's outcome. Where a tensor was encoded twice, the later outcomes count."""
    by_tensor: dict[str, list[dict[str, Any]]] = {e["tensor"]: e.get("feedback", []) for e in read_lines(journal)}
    return [outcome for outcomes in by_tensor.values() for outcome in outcomes]


def _squares(rows: np.ndarray, inputs: np.ndarray) -> float:
    """The sum of the squared products of rows float32 [n_rows, n] and inputs float32 [n, n_inputs]."""
    products = np.zeros((len(rows), inputs.shape[1]), np.float32)
    add_products(np.ascontiguousarray(rows, np.float32), inputs, 0, len(inputs), inputs.shape[1], products)
    return float(np.square(products, dtype=np.float64).sum())
