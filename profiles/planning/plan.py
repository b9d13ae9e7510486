"""A plan: for every tensor its format, its exact bytes and the reason. Made before anything runs, then executed."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from math import fsum
from typing import Any

from bitwright.formats.choices import Effort, FeedbackLevel
from bitwright.formats.feedback.moment_factor import DAMPING, ORDER
from bitwright.formats.pins import Pin
from bitwright.formats.registry import get_format
from bitwright.profiles.reading.budget import Budget
from bitwright.profiles.vocabulary import TensorSpec

# From this many bits on, rounding is so fine that the importance of a column changes nothing worth a calibration.
_BITS_THAT_NEED_NO_IMPORTANCE = 8.0


@dataclass(frozen=True)
class PlannedTensor:
    """One row of a plan. wanted: the format the profile asked for, where it differs from the one that fits.
    predicted_loss: the expected increase of the mean KL divergence in nats a token, where it was measured.
    pins: weights that the encoder has to reproduce, rows counted over all matrices. kept_out: the tensor is to stay as
    it is in the source, out of quantization. cache_scales: names of the scales of caches that follow it in the file."""

    tensor: TensorSpec
    format: str
    reason: str
    wanted: str | None = None
    predicted_loss: float | None = None
    pins: tuple[Pin, ...] = ()
    kept_out: bool = False
    cache_scales: tuple[str, ...] = ()

    @property
    def n_bytes(self) -> int:
        return self.tensor.n_rows * get_format(self.format).row_bytes(self.tensor.n_columns)

    @property
    def encoded_with(self) -> str:
        """The tensor whose weights tell what this one becomes, too: itself, or the matrix that a scale is of."""
        name = self.tensor.name
        return f"{name.removesuffix('.scale')}.weight" if self.tensor.origin == "scale" else name

    @property
    def extra_bytes(self) -> int:
        """What a fallback costs: bytes beyond the wanted format's rate, rounded to whole bytes."""
        if self.wanted is None:
            return 0
        return self.n_bytes - round(self.tensor.n_weights * get_format(self.wanted).bits_per_weight / 8)

    @property
    def needs_importance(self) -> bool:
        """Whether encoding without an importance matrix is refused."""
        return get_format(self.format).needs_importance

    @property
    def uses_importance(self) -> bool:
        """Whether the encoder's result depends on an importance matrix."""
        bits = get_format(self.format).bits_per_weight
        return self.tensor.layer is not None and bits < _BITS_THAT_NEED_NO_IMPORTANCE


@dataclass(frozen=True)
class Spent:
    """How a budget was met.

    gap: by how much, at most, a better choice could lower what was minimised: nats a token, or bytes where the goal is
    a divergence. exact: it was proven that there is no better choice.
    """

    budget: Budget
    gap: float
    exact: bool

    @property
    def text(self) -> str:
        """One line: the goal, and how near the best choice is."""
        unit = "nats" if self.budget.limits_size else "bytes"
        bound = f"the relaxed problem's bound is {self.gap:.2g} {unit} lower"
        goal = self.budget.goal or "as many bytes as the rules take"
        return f"budget of {goal}: {'the best choice' if self.exact else 'near the best choice'}; {bound}"


@dataclass(frozen=True)
class Plan:
    """What will be written, in the order of the file. evidence: identity of the measurements that decided.
    error_feedback: how long codes that take it are chosen together, see formats/feedback/choose.py; None for not.
    folding: the factors that channels are folded with, see converter/gguf/folding/record.py; "" for none."""

    profile: str
    effort: Effort
    tensors: tuple[PlannedTensor, ...]
    spent: Spent | None = None
    evidence: Mapping[str, str | int] = field(default_factory=dict)
    error_feedback: FeedbackLevel | None = None
    folding: str = ""

    @property
    def n_bytes(self) -> int:
        return sum(planned.n_bytes for planned in self.tensors)

    @property
    def n_weights(self) -> int:
        return sum(planned.tensor.n_weights for planned in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return self.n_bytes * 8 / self.n_weights

    @property
    def predicted_kld(self) -> float | None:
        """The sum of the predicted losses; None when a tensor's was not measured in its format."""
        losses = []
        for planned in self.tensors:
            if planned.tensor.quantizable:
                if planned.predicted_loss is None:
                    return None
                losses.append(planned.predicted_loss)
        return fsum(losses)

    @property
    def uses_importance(self) -> bool:
        return any(planned.uses_importance for planned in self.tensors)

    def rows(self) -> list[dict[str, Any]]:
        """The plan as plain data, one row a tensor."""
        return [
            {
                "tensor": planned.tensor.name,
                "role": planned.tensor.role.value,
                "layer": planned.tensor.layer,
                "shape": list(planned.tensor.shape),
                "format": planned.format,
                "bytes": planned.n_bytes,
                "bits_per_weight": planned.n_bytes * 8 / planned.tensor.n_weights,
                "wanted": planned.wanted,
                "extra_bytes": planned.extra_bytes,
                "predicted_loss": planned.predicted_loss,
                "pins": [list(astuple(pin)) for pin in planned.pins],
                "rescaled": [list(astuple(rescaled)) for rescaled in planned.tensor.rescaled],
                "kept_out": planned.kept_out,
                "cache_scales": list(planned.cache_scales),
                "reason": planned.reason,
            }
            for planned in self.tensors
        ]

    def digest(self) -> str:
        """SHA-256 over everything that decides the artifact's bytes: tensors, their order, formats, what protects their
        super weights, scales of caches, effort and error feedback."""
        keys = ("tensor", "shape", "format", "pins", "rescaled", "kept_out", "cache_scales")
        decided = [[row[key] for key in keys] for row in self.rows()]
        feedback = [self.error_feedback, DAMPING, ORDER] if self.error_feedback else []
        return hashlib.sha256(json.dumps([self.effort, decided, *feedback]).encode()).hexdigest()
