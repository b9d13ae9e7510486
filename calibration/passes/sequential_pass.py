"""A pass whose layers are encoded on the way: the inputs of every layer are those of the artifact, not of the source.

With one layer resident the samples, as the artifact's layers before have left them, go through the layer twice: as it
is, so that the second moments of its inputs are seen, and then with its weights as they have been encoded under these
moments, which gives the inputs of the next one (as GPTQ does it; Frantar et al. 2022). Where the encoded layers are
tuned, some samples go along as the source's layers leave them: what the source makes of these is the tuning's target.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from bitwright.calibration.control import Interrupted, PassControl
from bitwright.calibration.passes.importance_pass import fed_matrices, index_moments
from bitwright.calibration.passes.layer_tuning import LayerTask, Place, TunableBlocks, TunedBlocks, tune
from bitwright.calibration.passes.moment_observer import InputMoments
from bitwright.calibration.places import MatrixNames
from bitwright.calibration.stream.forward import LayerStream
from bitwright.calibration.stream.micro_batches import Excerpt
from bitwright.calibration.stream.observer import NoStatistic, Observer
from bitwright.calibration.stream.streamable import StreamableModel
from bitwright.calibration.stream.weights import WeightSource
from bitwright.formats.files.disk import remove_tree

TUNING_SAMPLES = 128
"""Samples that a layer is tuned on at most, two of 32 of them held out."""


class EncodedLayers(Protocol):
    """What encodes one layer after the other."""

    def encode(self, stored: frozenset[str]) -> WeightSource:
        """A layer of these stored tensors, whose moments are in the directory: its weights as they are encoded, under
        these names."""

    def tunable(self) -> Sequence[TunableBlocks]:
        """Of this layer, the blocks whose scales can be moved."""

    def tuned(self, result: Mapping[int, TunedBlocks]) -> WeightSource:
        """The layer's weights as they are stored with scales moved; result: by the index among the tunable ones."""

    def finish(self, errors: tuple[float, float] | None) -> None:
        """Keep the layer. errors: on held-out samples before and after its tuning; what was moved is kept where that
        falls. None for a layer that was not tuned."""


@dataclass(frozen=True)
class Tuning:
    """How layers are tuned: in so many steps, on draws by this seed. costs: layer -> of a squared difference in each
    channel of its output, float32 [hidden_size] of mean 1, where they are known."""

    steps: int
    seed: int = 0
    costs: Mapping[int, np.ndarray] = field(default_factory=dict)

    def identity(self) -> list[object]:
        """What decides the result."""
        hashes = {str(layer): sha256(costs.tobytes()).hexdigest() for layer, costs in sorted(self.costs.items())}
        return [self.steps, self.seed, hashes]


class SequentialStream(LayerStream):
    """Takes the samples through the layers, each of which is encoded on the way.

    moments_dir: holds the second moments of one layer at a time, whose names for tensors are by `names`.
    settings: whatever decides how layers are encoded: a checkpoint of others is refused. tuning: None for none.
    """

    on_all_gpus = False

    def __init__(
        self,
        streamable: StreamableModel,
        tokens: np.ndarray,
        control: PassControl,
        *,
        names: MatrixNames,
        moments_dir: Path,
        encoded: EncodedLayers,
        settings: Mapping[str, object],
        tuning: Tuning | None = None,
    ):
        self.names, self.moments_dir, self.encoded, self.tuning = names, moments_dir, encoded, tuning
        self.n_artifact = len(tokens)
        self.n_tuned = min(TUNING_SAMPLES, len(tokens)) if tuning is not None else 0
        settings = {**settings, "tuning": None if tuning is None else tuning.identity()}
        super().__init__(streamable, np.concatenate([tokens, tokens[: self.n_tuned]]), control, settings=settings)
        self._of_artifact = list(pairwise(Excerpt.whole(self.n_artifact).cuts()))  # held-out ones apart

    @property
    def layers_done(self) -> int:
        """Layers whose encoding a checkpoint counts on."""
        return max(self._checkpoint.layers_done, 0)

    def _through_layers(self, pool: ThreadPoolExecutor, report: Callable[[int, int], None]) -> None:
        calls = self.arranged.calls

        def first(index: int, weights: Mapping[str, torch.Tensor]) -> None:
            self.fit(
                self.batch, self.observed(partial(self.forward, calls[index], self.device), weights, NoStatistic())
            )

        with closing(self.layers_in_turn(range(self._checkpoint.layers_done, len(self.layers)), first)) as turns:
            for index, (weights,) in turns:
                forward = partial(self.forward, calls[index], self.device)
                remove_tree(self.moments_dir)
                n_tokens = self.n_artifact * self.sequence_length
                width, excerpt = self.config.hidden_size, Excerpt.whole(self.n_artifact)
                moments = InputMoments(self.moments_dir, width, n_tokens, excerpt=excerpt)
                self._take(self._of_artifact, pool, forward, weights, moments)
                self._take([(self.n_artifact, self.n_samples)], pool, forward, weights, NoStatistic())
                report(index, self.n_samples // 2)
                moments.to_arrays()  # writes them
                fed = fed_matrices(moments.counts, self.names, self.parameters)
                index_moments(self.moments_dir, moments.shared, fed)
                source = {} if self.tuning is None else {name: weight.clone() for name, weight in weights.items()}
                self._set(weights, self.encoded.encode(self._stored(weights)))
                self.encoded.finish(self._tune(pool, index, weights, source))
                self._take(self._of_artifact, pool, forward, weights, NoStatistic())
                report(index, self.n_samples)
                self._commit(index + 1)
                if self.control.should_stop():
                    raise Interrupted(f"stopped after layer {index + 1} of {len(self.layers)}")
        remove_tree(self.moments_dir)

    def _take(
        self,
        ranges: Sequence[tuple[int, int]],
        pool: ThreadPoolExecutor,
        forward: Callable[[int, int], None],
        weights: Mapping[str, torch.Tensor],
        observer: Observer,
    ) -> None:
        """Some samples through the resident layer."""
        for _ in self.for_all_samples(pool, forward, weights, observer, self.batch, ranges):
            pass

    def _tune(
        self,
        pool: ThreadPoolExecutor,
        index: int,
        weights: Mapping[str, torch.Tensor],
        source: Mapping[str, torch.Tensor],
    ) -> tuple[float, float] | None:
        """Tune the encoded layer that is resident, and leave it as it is to be stored; see EncodedLayers.finish.
        source: its weights as they were before."""
        places = self._places(weights)
        if self.tuning is None:
            return None
        blocks = {i: each for i, each in enumerate(self.encoded.tunable()) if each.stored in places}
        if not blocks:
            return None
        layer, prefix = self.layers[index], self._names[self.layers[index]]
        parameters = {f"{prefix}.{name}": parameter for name, parameter in layer.named_parameters()}
        costs = self.tuning.costs.get(index)
        task = LayerTask(
            self.arranged.calls[index],
            parameters,
            source,
            places,
            self._checkpoint.hidden(index),
            self._checkpoint.hidden(index + 1),
            self.n_artifact,
            self.n_tuned,
            self.layouts[index],
            self.layouts[index + 1],
            None if costs is None else torch.from_numpy(costs).to(self.device),
        )
        before = {name: weight.clone() for name, weight in weights.items()}
        error = task.held_out_error(pool)
        layer.requires_grad_(True)
        with torch.enable_grad():
            tuned = tune(task, list(blocks.values()), self.tuning.steps, self.tuning.seed + index, pool, error)
        layer.requires_grad_(False)
        self._set(weights, self.encoded.tuned(dict(zip(blocks, tuned, strict=True))))
        after = task.held_out_error(pool)
        if after >= error:
            for name, weight in weights.items():
                weight.copy_(before[name])
        return error, after

    def _set(self, weights: Mapping[str, torch.Tensor], source: WeightSource) -> None:
        """Give the resident layer other weights."""
        parameters = self.parameters.of(source)
        for name, weight in weights.items():
            read = parameters.read(name, weight, self._transfer)
            self._transfer.arrive()
            weight.copy_(read)

    def _stored(self, weights: Mapping[str, torch.Tensor]) -> frozenset[str]:
        """The names under which a layer's weights are stored."""
        matrices = (self.parameters.matrices(name) for name in weights)
        return frozenset(name for of_parameter in matrices for names in of_parameter for name in names)

    def _places(self, weights: Mapping[str, torch.Tensor]) -> dict[str, Place]:
        """Where stored tensors are in the layer's parameters, of those that are stored whole, or a matrix each, and as
        they are computed with."""
        places = {}
        for name, weight in weights.items():
            matrices = self.parameters.matrices(name)
            if self.parameters.may_be_exchanged(name) or any(len(names) > 1 for names in matrices):
                continue
            n_rows = weight.numel() // weight.shape[-1] if weight.dim() > 1 else 1
            for i, (stored,) in enumerate(matrices):
                places[stored] = Place(name, i * n_rows // len(matrices))
        return places

    def _observe_head(self) -> None:
        """Nothing of the head is to be known."""
        self._commit(len(self.layers), complete=True)
