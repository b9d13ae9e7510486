"""A pass whose layers are encoded on the way: the inputs of every layer are those of the artifact, not of the source.

With one layer resident the samples, as the artifact's layers before have left them, go through the layer twice: as it
is, so that the second moments of its inputs are seen, and then with its weights as they have been encoded under these
moments, which gives the inputs of the next one (as GPTQ does it; Frantar et al. 2022).
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bitwright.calibration.control import Interrupted, PassControl
from bitwright.calibration.passes.importance_pass import moment_groups
from bitwright.calibration.passes.moment_observer import InputMoments
from bitwright.calibration.places import MatrixNames
from bitwright.calibration.statistics.second_moments import write_index
from bitwright.calibration.stream.forward import LayerStream
from bitwright.calibration.stream.observer import NoStatistic
from bitwright.calibration.stream.streamable import StreamableModel
from bitwright.calibration.stream.weights import WeightSource
from bitwright.formats.files.disk import remove_tree

EncodeLayer = Callable[[frozenset[str]], None]
"""Called with the names of the stored tensors of a layer, whose moments are in the directory then; when it returns,
reading these tensors from the encoded weights gives what they have become."""


class SequentialStream(LayerStream):
    """Takes the samples through the layers, each of which `encode_layer` encodes on the way.

    encoded: the weights as far as they are encoded, under the checkpoint's names; those of the source otherwise.
    moments_dir: holds the second moments of one layer at a time, whose names for tensors are by `names`.
    settings: whatever decides how layers are encoded: a checkpoint of others is refused.
    """

    def __init__(
        self,
        streamable: StreamableModel,
        encoded: WeightSource,
        tokens: np.ndarray,
        control: PassControl,
        *,
        names: MatrixNames,
        moments_dir: Path,
        encode_layer: EncodeLayer,
        settings: Mapping[str, object],
    ):
        super().__init__(streamable, tokens, control, settings=settings, held_out_apart=True)
        self.names, self.moments_dir, self.encode_layer = names, moments_dir, encode_layer
        self.encoded_parameters = self.parameters.of(encoded)

    @property
    def layers_done(self) -> int:
        """Layers whose encoding a checkpoint counts on."""
        return max(self._checkpoint.layers_done, 0)

    def _through_layers(self, pool: ThreadPoolExecutor, report: Callable[[int, int], None]) -> None:
        calls = self.arranged.calls
        with closing(self.layers_in_turn(range(self._checkpoint.layers_done, len(self.layers)))) as turns:
            for index, weights in turns:
                states = self._checkpoint.hidden(index), self._checkpoint.hidden(index + 1)
                micro_batch = partial(self._forward, calls[index], *states)
                remove_tree(self.moments_dir)
                moments = InputMoments(self.moments_dir, self.config.hidden_size, self.tokens.size)
                for samples_done in self.for_all_samples(pool, micro_batch, weights, moments, self._batch):
                    report(index, samples_done // 2)
                moments.to_arrays()  # writes them
                write_index(self.moments_dir, moment_groups(moments, self.names, self.parameters))
                self.encode_layer(self._stored(weights))
                for name, weight in weights.items():
                    weight.copy_(self.encoded_parameters.read(name, weight, self.device))
                for samples_done in self.for_all_samples(pool, micro_batch, weights, NoStatistic(), self._batch):
                    report(index, (self.n_samples + samples_done) // 2)
                self._commit(index + 1)
                if self.control.should_stop():
                    raise Interrupted(f"stopped after layer {index + 1} of {len(self.layers)}")
        remove_tree(self.moments_dir)

    def _stored(self, weights: Mapping[str, torch.Tensor]) -> frozenset[str]:
        """The names under which a layer's weights are stored."""
        matrices = (self.parameters.matrices(name) for name in weights)
        return frozenset(name for of_parameter in matrices for names in of_parameter for name in names)

    def _observe_head(self) -> None:
        """Nothing of the head is to be known."""
        self._commit(len(self.layers), complete=True)
