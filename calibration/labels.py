"""The labels that a loss is taken against: the text's own next tokens, or tokens drawn from the model's predictions."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Labels = Literal["sampled", "text"]


def draw(probabilities: "torch.Tensor", uniform: "torch.Tensor") -> "torch.Tensor":
    """One index for every row of probabilities [n, k], by inversion of the cumulated ones at uniform numbers [n] of
    [0, 1): int64 [n]. Sums are float64: float32 would never reach the tail of a large vocabulary."""
    import torch

    device = probabilities.device
    if device.type == "mps":  # it has no float64
        probabilities = probabilities.cpu()
    cumulated = probabilities.double().cumsum(-1)
    threshold = uniform.to(cumulated.device)[:, None] * cumulated[:, -1:]
    drawn = torch.searchsorted(cumulated, threshold, right=True)[:, 0]
    return drawn.clamp_(max=probabilities.shape[-1] - 1).to(device)
