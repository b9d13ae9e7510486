"""Tuning an encoded layer: what it stores is moved so that its output comes nearest to the source's.

A weight is a scale times a level, less a minimum. What moves, by gradients of the squared difference between what the
encoded layer makes of the artifact's inputs and what the source's layer makes of its own (as in AQLM, Egiazarov et al.
2024, and AutoRound, Cheng et al. 2023):
- the scale and the minimum of a block, which are floats, by a factor each;
- those of its sub-blocks, by a factor each, to the nearest value that can be stored (straight-through: the gradient
  passes the rounding as if it were not there);
- the levels, by the signs of their gradients: each begins where the source's weight lies between two of them, and is
  the other one when it has come past the middle.
Norms and biases stay: moved along, they bought nothing that was measured.

Gradients of samples are summed in their order, and every draw is by the seed: the same result on any number of threads.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from bitwright.calibration.stream.anatomy.state import HIDDEN, Layout
from bitwright.calibration.stream.backward import deterministic_attention
from bitwright.calibration.stream.checkpointing import HiddenStates
from bitwright.calibration.stream.micro_batches import is_held_out
from bitwright.calibration.stream.model import LayerCall

SAMPLES_A_STEP = 4
LEARNING_RATE, _FOR_LEVELS = 2e-3, 16
"""Of the factors, which begin at 1, of at most so many levels; of more levels it is less, as these are nearer to one
another. It falls to nothing, in even steps."""
ROUNDING_WAY, _FOR_STEPS = 0.2, 64
"""How far a level goes whose gradient always has the same sign, of the way to the next one, in at least so many steps;
in fewer it goes less far, as long strides of many levels at once overshoot."""
_NEAREST_THE_MIDDLE = 0.45
_LOOKS = 4
_BETAS, _EPSILON = (0.9, 0.95), 1e-8


@dataclass(frozen=True, eq=False)
class TunableBlocks:
    """Blocks of some rows of a matrix, a weight being
    units[0] * scale_table[scales[0]] * level_table[levels] - units[1] * minimum_table[scales[1]].

    stored: the matrix's name; rows: int64 [n], which of its rows, over all its matrices.
    units: float32 [n, n_blocks, 2]; moves_units: whether they may move.
    scales: int16 [n, n_blocks, 2, n_sub], places in the tables, which are float32 and ascending; of length 1 where a
    sub-block stores nothing.
    levels: int16 [n, n_blocks, block_size], places in level_table, float32, ascending; where weights are points of a
    codebook, which stay, their coordinates, float32, and level_table is None.
    places: int16 [n, n_blocks, 2], the first and the last place that a block's levels can take; None for all.
    """

    stored: str
    rows: np.ndarray
    units: np.ndarray
    moves_units: bool
    scales: np.ndarray
    scale_table: np.ndarray
    minimum_table: np.ndarray
    levels: np.ndarray
    level_table: np.ndarray | None
    places: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class TunedBlocks:
    """What becomes of TunableBlocks: factors, float32 [n, n_blocks, 2], of its units; scales and levels as there, and
    levels None for points."""

    factors: np.ndarray
    scales: np.ndarray
    levels: np.ndarray | None


@dataclass(frozen=True)
class Place:
    """Where a stored tensor is in a parameter of the layer: from which row on, of the parameter as one matrix."""

    parameter: str
    first_row: int


@dataclass(frozen=True, eq=False)
class LayerTask:
    """A layer that is to do what the source's does.

    call: it; parameters: its own, by full name, resident; source: the same as the source has them; places: stored name
    -> where it is in them.
    inputs: what the artifact gives it, samples 0 to n_samples; targets: what the source's layer makes of the source's
    inputs for these, from `first_target` on. before, after: the layouts of the states. costs: of a squared difference
    in each channel of the output, float32 [hidden_size] of mean 1; None where all cost the same.
    """

    call: LayerCall
    parameters: Mapping[str, torch.nn.Parameter]
    source: Mapping[str, torch.Tensor]
    places: Mapping[str, Place]
    inputs: HiddenStates
    targets: HiddenStates
    first_target: int
    n_samples: int
    before: Layout
    after: Layout
    costs: torch.Tensor | None

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def difference(self, sample: int) -> torch.Tensor:
        """The mean squared difference of a sample's outputs by its costs, a scalar."""
        target = self.first_target + sample
        made, _ = self.call(self.inputs.read(sample, sample + 1).to(self.device), self.before)
        wanted = self.targets.read(target, target + 1).to(self.device)
        hidden, of_source = self.after.unpack(made)[HIDDEN], self.after.unpack(wanted)[HIDDEN]
        squares = (hidden - of_source).float().square()
        return (squares if self.costs is None else squares * self.costs).mean()

    def held_out_error(self, pool: ThreadPoolExecutor) -> float:
        """The mean over the samples that are held out."""

        def error(sample: int) -> float:
            with torch.no_grad():
                return float(self.difference(sample))

        held_out = [sample for sample in range(self.n_samples) if is_held_out(sample)]
        return sum(pool.map(error, held_out)) / len(held_out)


def tune(
    task: LayerTask,
    tunable: Sequence[TunableBlocks],
    n_steps: int,
    seed: int,
    pool: ThreadPoolExecutor,
    before: float,
) -> list[TunedBlocks]:
    """What becomes of the blocks, which are of tensors that the task has places for: the best, on samples that are held
    out, of what there is at the beginning and after each quarter of the steps. The resident parameters are left with
    the last one. before: the error of the former on these samples."""
    blocks = [_Blocks(task, each) for each in tunable]
    rates = [each.rate for each in blocks if each.factors]
    groups = [{"params": each.factors, "lr": each.rate} for each in blocks if each.factors]
    adam = torch.optim.Adam(groups, betas=_BETAS, eps=_EPSILON) if groups else None
    samples = [sample for sample in range(task.n_samples) if not is_held_out(sample)]
    random = np.random.default_rng(seed)
    parameters = {each.parameter: task.parameters[each.parameter] for each in blocks}

    def gradients(sample: int) -> tuple[torch.Tensor | None, ...]:
        return torch.autograd.grad(task.difference(sample), list(parameters.values()), allow_unused=True)

    least, best = before, [each.result() for each in blocks]
    looks = {n_steps * (i + 1) // _LOOKS for i in range(_LOOKS)}
    with deterministic_attention(task.device):
        for step in range(n_steps):
            rest = 1 - step / n_steps  # of the way: what rates and strides fall by
            chosen = random.choice(samples, min(SAMPLES_A_STEP, len(samples)), replace=False)
            sums: dict[str, torch.Tensor] = {}
            for of_sample in pool.map(gradients, chosen.tolist()):
                for name, gradient in zip(parameters, of_sample, strict=True):
                    if gradient is not None:
                        sums[name] = gradient.float() if name not in sums else sums[name] + gradient
            with torch.no_grad():
                for each in blocks:
                    each.take(sums.get(each.parameter), 2 * rest / max(n_steps, _FOR_STEPS) * ROUNDING_WAY)
                if adam is not None:
                    for group, rate in zip(adam.param_groups, rates, strict=True):
                        group["lr"] = rate * rest
                    adam.step()
                for each in blocks:
                    each.set(parameters[each.parameter])
            if step + 1 in looks and (error := task.held_out_error(pool)) < least:
                least, best = error, [each.result() for each in blocks]
    return best


class _Blocks:
    """TunableBlocks in their parameter. factors: the leaves that have gradients, of the steps' scales and then of the
    minima's, see _Scaled; rate: at which they learn."""

    def __init__(self, task: LayerTask, blocks: TunableBlocks):
        place = task.places[blocks.stored]
        self.parameter, self._device = place.parameter, task.device
        self._rows = self._tensor(blocks.rows) + place.first_row
        self._has_minima = bool(blocks.units[..., 1].any())
        tables = (blocks.scale_table, blocks.minimum_table)
        self._scaled = [
            _Scaled(
                self._tensor(blocks.units[..., kind, None]),
                self._tensor(blocks.scales[:, :, kind]),
                self._tensor(tables[kind]),
                blocks.moves_units,
            )
            for kind in range(2 if self._has_minima else 1)
        ]
        self.factors = [factor for scaled in self._scaled for factor in scaled.factors]
        shape = (*blocks.scales.shape[:2], blocks.scales.shape[-1], -1)
        self._levels = self._tensor(blocks.levels).reshape(shape)
        self._table = None if blocks.level_table is None else self._tensor(blocks.level_table)
        self._ends: tuple[torch.Tensor, torch.Tensor] | None = None
        if blocks.places is not None:
            first, last = (self._tensor(blocks.places[..., end, None, None]) for end in (0, 1))
            self._ends = first, last
        n_levels = _FOR_LEVELS if self._table is None else len(self._table)
        self.rate = LEARNING_RATE * min(1.0, _FOR_LEVELS / n_levels)
        self._gone = None
        if self._table is not None:
            self._gone = self._begun(task.source[self.parameter])
        self._unmoved = blocks.scales

    def _begun(self, source: torch.Tensor) -> torch.Tensor:
        """How far every level is on the way to the next one, up or down, where the source's weight is."""
        assert self._table is not None
        weights = source.reshape(-1, source.shape[-1])[self._rows].float().reshape(self._levels.shape)
        if self._has_minima:
            weights = weights + self._scaled[1].values()[..., None]
        steps = self._scaled[0].values()[..., None]
        places = self._levels.long()
        beyond = torch.where(steps == 0, 0.0, weights / steps) - self._table[places]
        gaps = self._table.diff()
        next_gap = torch.where(beyond > 0, gaps[places.clamp(max=len(gaps) - 1)], gaps[(places - 1).clamp(min=0)])
        return (beyond / next_gap).clamp(-_NEAREST_THE_MIDDLE, _NEAREST_THE_MIDDLE)

    def take(self, whole: torch.Tensor | None, stride: float) -> None:
        """Give the factors their gradients, and move the levels by a stride, from the gradient by the parameter; None
        for one that these samples do not reach."""
        gradient = torch.zeros_like(self._levels, dtype=torch.float32)
        if whole is not None:
            gradient = whole.reshape(-1, whole.shape[-1])[self._rows].reshape(gradient.shape)
        values = [gradient * self._values(), -gradient]
        for scaled, of_weights in zip(self._scaled, values, strict=False):
            scaled.take(of_weights.sum(-1))
        if self._gone is not None:
            uphill = torch.sign(gradient * self._scaled[0].values()[..., None])
            self._gone.sub_(uphill, alpha=stride).clamp_(-1, 1)

    def set(self, whole: torch.Tensor) -> None:
        """The rows' weights."""
        values = self._scaled[0].values()[..., None] * self._values()
        if self._has_minima:
            values -= self._scaled[1].values()[..., None]
        whole.view(-1, whole.shape[-1])[self._rows] = values.reshape(len(self._rows), -1).to(whole.dtype)

    def result(self) -> TunedBlocks:
        factors, scales = np.ones((*self._unmoved.shape[:2], 2), np.float32), self._unmoved.copy()
        for kind, scaled in enumerate(self._scaled):
            factors[..., kind] = _array(scaled.unit_factor[..., 0])
            scales[:, :, kind] = _array(scaled.places())
        levels = None if self._gone is None else _array(self._places()).astype(np.int16)
        shape = (*self._unmoved.shape[:2], -1)
        return TunedBlocks(factors, scales, None if levels is None else levels.reshape(shape))

    def _places(self) -> torch.Tensor:
        assert self._table is not None and self._gone is not None
        moved: torch.Tensor = self._levels + torch.round(self._gone).to(self._levels.dtype)
        return moved.clamp_(0, len(self._table) - 1) if self._ends is None else moved.clamp_(*self._ends)

    def _values(self) -> torch.Tensor:
        """The levels' values, or the points' coordinates."""
        return self._levels if self._table is None else self._table[self._places().long()]

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


class _Scaled:
    """The scales of steps, or of minima: a unit a block times a value of the table a sub-block.

    units: float32 [n, n_blocks, 1]; scales: int16 [n, n_blocks, n_sub]; table: float32, ascending. factors: of the
    units, of their shape, where they may move, and of the sub-blocks' scales, where they are stored.
    """

    def __init__(self, units: torch.Tensor, scales: torch.Tensor, table: torch.Tensor, moves_units: bool):
        self._units, self._scales, self._table = units, scales, table
        self._stored = table[scales.long()]
        self._moves_units, self._has_places = moves_units, len(table) > 1
        self.unit_factor, self._sub_factor = torch.ones_like(units), torch.ones_like(self._stored)
        self.factors = [self.unit_factor] * self._moves_units + [self._sub_factor] * self._has_places
        self._between = (table[1:] + table[:-1]) / 2

    def places(self) -> torch.Tensor:
        """Of the values in the table that are nearest to what the sub-blocks' scales have become."""
        if not self._has_places:
            return self._scales
        return torch.searchsorted(self._between, self._stored * self._sub_factor)

    def values(self) -> torch.Tensor:
        """[n, n_blocks, n_sub]."""
        return self._units * self.unit_factor * self._table[self.places().long()]

    def take(self, gradient: torch.Tensor) -> None:
        """Of every sub-block's scale, [n, n_blocks, n_sub]."""
        if self._moves_units:
            of_units = gradient * self._table[self.places().long()]
            self.unit_factor.grad = of_units.sum(-1, keepdim=True) * self._units
        if self._has_places:
            self._sub_factor.grad = gradient * self._units * self.unit_factor * self._stored


def _array(tensor: torch.Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().cpu().numpy()
    return array
