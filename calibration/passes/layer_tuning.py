"""Tuning an encoded layer: what it stores beside codes is moved so that its output comes nearest to the source's.

The blocks of a format are linear in what they store beside codes: a weight is `scale * step - offset * minimum`. With
codes and sub-scales as they are, a factor for every block's scale and offset is moved by gradients of the squared
difference between what the encoded layer makes of the artifact's inputs and what the source's layer makes of its own
(as AQLM and AutoRound do with theirs; Egiazarov et al. 2024, Cheng et al. 2023). Norms and biases stay: moved along,
they bought nothing that was measured.

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
LEARNING_RATE = 2e-3
"""Of the factors, which begin at 1; it falls to nothing, in even steps."""
_BETAS, _EPSILON = (0.9, 0.95), 1e-8


@dataclass(frozen=True, eq=False)
class TunableBlocks:
    """Blocks of some rows of a matrix. stored: its name; rows: int64 [n], which of its rows, over all its matrices.

    steps, minima: float32 [n, n_blocks, block_size], a weight being the one less the other; minima: None for none.
    """

    stored: str
    rows: np.ndarray
    steps: np.ndarray
    minima: np.ndarray | None


@dataclass(frozen=True, eq=False)
class TunedBlocks:
    """By what the steps and the minima of TunableBlocks are to be multiplied: float32 [n, n_blocks]; None for none."""

    steps: np.ndarray
    minima: np.ndarray | None


@dataclass(frozen=True)
class Place:
    """Where a stored tensor is in a parameter of the layer: from which row on, of the parameter as one matrix."""

    parameter: str
    first_row: int


@dataclass(frozen=True, eq=False)
class LayerTask:
    """A layer that is to do what the source's does.

    call: it; parameters: its own, by full name, resident; places: stored name -> where it is in them.
    inputs: what the artifact gives it, samples 0 to n_samples; targets: what the source's layer makes of the source's
    inputs for these, from `first_target` on. before, after: the layouts of the states.
    """

    call: LayerCall
    parameters: Mapping[str, torch.nn.Parameter]
    places: Mapping[str, Place]
    inputs: HiddenStates
    targets: HiddenStates
    first_target: int
    n_samples: int
    before: Layout
    after: Layout

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def difference(self, sample: int) -> torch.Tensor:
        """The mean squared difference of a sample's outputs, a scalar."""
        target = self.first_target + sample
        made, _ = self.call(self.inputs.read(sample, sample + 1).to(self.device), self.before)
        wanted = self.targets.read(target, target + 1).to(self.device)
        hidden, of_source = self.after.unpack(made)[HIDDEN], self.after.unpack(wanted)[HIDDEN]
        return (hidden - of_source).float().square().mean()

    def held_out_error(self, pool: ThreadPoolExecutor) -> float:
        """The mean over the samples that are held out."""

        def error(sample: int) -> float:
            with torch.no_grad():
                return float(self.difference(sample))

        held_out = [sample for sample in range(self.n_samples) if is_held_out(sample)]
        return sum(pool.map(error, held_out)) / len(held_out)


def tune(
    task: LayerTask, tunable: Sequence[TunableBlocks], n_steps: int, seed: int, pool: ThreadPoolExecutor
) -> list[TunedBlocks]:
    """What becomes of the blocks, which are of tensors that the task has places for. The resident parameters are left
    with the result in their own dtype."""
    blocks = [_Blocks(task, each) for each in tunable]
    leaves = [factor for each in blocks for factor in each.factors]
    adam = torch.optim.Adam(leaves, lr=LEARNING_RATE, betas=_BETAS, eps=_EPSILON)
    samples = [sample for sample in range(task.n_samples) if not is_held_out(sample)]
    random = np.random.default_rng(seed)

    def gradients(sample: int) -> list[torch.Tensor]:
        """Of a sample's difference by every leaf, in their order."""
        found = torch.autograd.grad(task.difference(sample), list(task.parameters.values()), allow_unused=True)
        by_name = dict(zip(task.parameters, found, strict=True))
        return [gradient for each in blocks for gradient in each.gradients(by_name[each.parameter])]

    with deterministic_attention(task.device):
        for step in range(n_steps):
            for group in adam.param_groups:
                group["lr"] = LEARNING_RATE * (1 - step / n_steps)
            chosen = random.choice(samples, min(SAMPLES_A_STEP, len(samples)), replace=False)
            for leaf, *of_samples in zip(leaves, *pool.map(gradients, chosen.tolist()), strict=True):
                leaf.grad = torch.stack(of_samples).sum(0)
            adam.step()
            with torch.no_grad():
                for each in blocks:
                    each.set(task.parameters[each.parameter])
    return [TunedBlocks(*map(_array, each.factors), *[None] * (2 - len(each.factors))) for each in blocks]


class _Blocks:
    """TunableBlocks in their parameter. factors: float32 [n, n_blocks], of the steps and, where there are any, of the
    minima."""

    def __init__(self, task: LayerTask, blocks: TunableBlocks):
        place = task.places[blocks.stored]
        self.parameter = place.parameter
        self._rows = torch.from_numpy(blocks.rows).to(task.device) + place.first_row
        parts = [blocks.steps] if blocks.minima is None else [blocks.steps, -blocks.minima]
        self._parts = [torch.from_numpy(np.ascontiguousarray(part, np.float32)).to(task.device) for part in parts]
        self.factors = [torch.ones(part.shape[:2], device=task.device) for part in self._parts]

    def gradients(self, whole: torch.Tensor | None) -> list[torch.Tensor]:
        """By the factors, from the gradient by the parameter; None for one that these samples do not reach."""
        if whole is None:
            return [torch.zeros_like(factor) for factor in self.factors]
        of_rows = whole.reshape(-1, whole.shape[-1])[self._rows].float().reshape(self._parts[0].shape)
        return [(of_rows * part).sum(-1) for part in self._parts]

    def set(self, whole: torch.Tensor) -> None:
        """The rows' weights by the factors."""
        values = torch.stack([part * f[:, :, None] for part, f in zip(self._parts, self.factors, strict=True)]).sum(0)
        whole.view(-1, whole.shape[-1])[self._rows] = values.reshape(len(self._rows), -1).to(whole.dtype)


def _array(tensor: torch.Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().float().cpu().numpy()
    return array
