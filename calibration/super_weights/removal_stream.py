"""One pass of a text through several copies of a model, each of which lacks some of its weights.

What the model computes before the first layer that loses a weight is the source's own, and computed once for all. From
there on every copy has hidden states of its own, and a layer's weights are read once for all copies.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from bitwright.calibration.control import PassControl
from bitwright.calibration.stream.forward import LayerStream
from bitwright.calibration.stream.model import LayerCall, Weights
from bitwright.calibration.stream.streamable import StreamableModel
from bitwright.calibration.stream.weights import WeightSource

# A weight of the checkpoint: its tensor, the row over all matrices of the tensor, and the column.
Stored = tuple[str, int, int]


class WithoutWeights:
    """A source of weights in which some are zero."""

    def __init__(self, source: WeightSource, removed: Iterable[Stored]):
        self._source, self._removed = source, sorted(removed)
        self.tensors = source.tensors

    def read(self, name: str) -> np.ndarray:
        weights = self._source.read(name)
        places = [(row, column) for tensor, row, column in self._removed if tensor == name]
        if places:
            weights = weights.copy()
            rows = weights.reshape(-1, weights.shape[-1])
            for row, column in places:
                rows[row, column] = 0
        return weights


@dataclass(frozen=True, order=True)
class Removal:
    """Weights that are set to zero together. first_layer: the first one that loses any; weights: in order."""

    first_layer: int
    weights: tuple[Stored, ...]


class RemovalStream(LayerStream):
    """The samples of a finished stream that has kept every layer's input, once for each of these removals.

    Sample i without the weights of removals[k] is sample k * source.n_samples + i. removals: in order, the one that
    begins in the earliest layer first, so that what is running is always the first copies. What a copy gives depends on
    no other. It runs on one GPU, as every copy has its own weights.
    """

    on_all_gpus = False

    def __init__(
        self, source: LayerStream, streamable: StreamableModel, removals: Sequence[Removal], control: PassControl
    ):
        super().__init__(
            streamable,
            np.tile(source.tokens, (len(removals), 1)),
            control,
            settings={"removed": [[list(weight) for weight in removal.weights] for removal in removals]},
            after=(source, removals[0].first_layer),
        )
        self._source, self._removals = source, removals

    def copy(self, k: int) -> tuple[int, int]:
        """The first sample without removals[k], and the one after the last."""
        return k * self._source.n_samples, (k + 1) * self._source.n_samples

    def through_layer(
        self, pool: ThreadPoolExecutor, call: LayerCall, weights: Weights, *of_copies: Weights
    ) -> Iterator[int]:
        begun = [k for k, removal in enumerate(self._removals) if removal.first_layer <= call.index]
        changed = {k: names for k in begun if (names := self._losing(k, weights))}
        alike = [k for k in begun if k not in changed]
        samples_done = 0
        for copies in [alike, *([k] for k in changed)] if alike else [[k] for k in changed]:
            with self._without(call, weights, copies[0], changed.get(copies[0], ())) as present:
                ranges = [self.copy(k) for k in copies]
                forward = partial(self.forward, call, self.device)
                for _ in self.for_all_samples(pool, forward, present, self.observer, self.batch, ranges):
                    pass
            samples_done += len(copies) * self._source.n_samples
            yield samples_done

    def layer_inputs(self, index: int, device: torch.device, start: int, stop: int) -> torch.Tensor:
        k, first = divmod(start, self._source.n_samples)
        if self._removals[k].first_layer == index:
            return self.read_states(self._source.hidden(index), first, first + stop - start, device)
        return self.read_states(self.hidden(index), start, stop, device)

    def _losing(self, k: int, weights: Weights) -> list[str]:
        """Those of a layer's parameters that lack weights in removals[k]."""
        tensors = {tensor for tensor, _, _ in self._removals[k].weights}
        return [name for name in weights if any(tensors.intersection(of) for of in self.parameters.matrices(name))]

    @contextmanager
    def _without(self, call: LayerCall, weights: Weights, k: int, names: Sequence[str]) -> Iterator[Weights]:
        """The layer, whose weights are resident, with these parameters as removals[k] leaves them; yields all of its
        weights by full name."""
        reader = self.parameters.of(WithoutWeights(self.parameters.source, self._removals[k].weights))
        changed = {name: reader.read(name, weights[name], self._transfer) for name in names}
        self._transfer.arrive()
        self._load(call, changed)
        try:
            yield weights | changed
        finally:
            self._load(call, {name: weights[name] for name in names})

    def _load(self, call: LayerCall, parameters: Weights) -> None:
        stem = f"{self._names[call.layer]}."
        own = {name.removeprefix(stem): weight for name, weight in parameters.items()}
        call.layer.load_state_dict(own, strict=False, assign=True)
