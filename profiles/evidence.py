"""What was measured of a model and decisions rest on, as plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np


@dataclass(frozen=True)
class Evidence:
    """losses: GGUF tensor -> format -> expected increase of the mean KL divergence, in nats a token.
    layer_scores: layer -> how much it matters, in any unit. columns: GGUF tensor -> [n_matrices, n_columns], what an
    error in a column costs, in any unit. where: the file it is from, for messages. identity: what an artifact says of
    it in its recipe."""

    losses: Mapping[str, Mapping[str, float]]
    layer_scores: Mapping[int, float]
    where: str
    columns: Mapping[str, np.ndarray] = field(default_factory=dict, compare=False, repr=False)
    identity: Mapping[str, str | int] = field(default_factory=dict)

    def corrected(self, factors: Mapping[str, float]) -> "Evidence":
        """This evidence with the losses of these tensors multiplied."""
        losses = {
            name: {f: loss * factors.get(name, 1.0) for f, loss in of_tensor.items()}
            for name, of_tensor in self.losses.items()
        }
        return replace(self, losses=losses)
