"""What was measured of a model and decisions rest on, as plain data."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Evidence:
    """losses: GGUF tensor -> format -> expected increase of the mean KL divergence, in nats a token.
    layer_scores: layer -> how much it matters, in any unit. where: the file it is from, for messages."""

    losses: Mapping[str, Mapping[str, float]]
    layer_scores: Mapping[int, float]
    where: str
