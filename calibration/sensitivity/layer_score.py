"""One number a layer, for profiles that sort layers into tiers: how much it matters beside the model's others."""

from collections.abc import Mapping
from dataclasses import astuple, dataclass

import numpy as np

from bitwright.calibration.sensitivity.fisher import FisherFactors
from bitwright.formats.errors import ConvertError


@dataclass(frozen=True)
class ScoreWeights:
    """Shares of a layer's score; only their proportions count. Raises ConvertError unless they are finite, none is
    negative and one is not zero."""

    gradient_magnitude: float = 0.5
    activation_variance: float = 0.3
    weight_magnitude: float = 0.2

    def __post_init__(self) -> None:
        shares = np.array(astuple(self))
        if not np.isfinite(shares).all() or (shares < 0).any() or not shares.any():
            raise ConvertError(
                f"{astuple(self)} are no shares of a score",
                "weights of the layer score",
                "give numbers from 0 on, of which one is not 0",
            )


def layer_scores(
    factors: FisherFactors, layers: Mapping[str, int], weights: ScoreWeights | None = None
) -> dict[int, float]:
    """The score of every layer, in their order: 0 to 1, more for those that matter more.

    layers: GGUF tensor -> index of its layer; tensors that it or the factors lack count for none. Of a layer each
    magnitude is the mean over its weights, gradients as root mean square, as a share of the largest layer's.
    weights: None for ScoreWeights().
    """
    weights = weights or ScoreWeights()
    tensors: dict[int, list[str]] = {}
    for tensor, layer in layers.items():
        if tensor in factors.rows:
            tensors.setdefault(layer, []).append(tensor)
    order = sorted(tensors)
    shares = np.array(astuple(weights))
    magnitudes = np.array([_magnitudes(factors, tensors[layer]) for layer in order]).reshape(len(order), len(shares))
    largest = magnitudes.max(axis=0, initial=0.0)
    relative = np.divide(magnitudes, largest, out=np.zeros_like(magnitudes), where=largest > 0)
    return dict(zip(order, (relative @ shares / shares.sum()).tolist(), strict=True))


def _magnitudes(factors: FisherFactors, tensors: list[str]) -> list[float]:
    """In the order of ScoreWeights."""
    sizes = [factors.rows[tensor].size * factors.columns[tensor].shape[1] for tensor in tensors]
    squares = [factors.gradient_magnitude[tensor] ** 2 for tensor in tensors]
    return [
        float(np.average(squares, weights=sizes)) ** 0.5,
        float(np.average([factors.activation_variance[tensor] for tensor in tensors], weights=sizes)),
        float(np.average([factors.weight_magnitude[tensor] for tensor in tensors], weights=sizes)),
    ]
