"""What goes from layer to layer: the hidden states, and what some models pass beside them, in one tensor.

Most models pass hidden states [n_samples, sequence_length, width] alone. Gemma 3n and 4 also hand every layer an input
of its own that depends on the tokens, and keys and values from one layer to later ones. All of it is kept by position,
side by side, as one tensor [n_samples, sequence_length, total width]: what carries hidden states from layer to layer,
forwards to a file and backwards as gradients, carries these with them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch

HIDDEN = "hidden"
# Names of the other parts: what a layer, or those that share a cache, find in the state.
_INPUT, _SHARED = "input of layer", "shared"

# Integers below 2 ** 24 are kept as digits, which bfloat16 holds exactly.
_DIGIT, _N_DIGITS = 256, 3

Tensors = Mapping[str, torch.Tensor]


def input_name(layer: int, argument: str) -> str:
    return f"{_INPUT}/{layer}/{argument}"


def shared_name(key: str, index: int) -> str:
    return f"{_SHARED}/{key}/{index}"


def inputs_of(parts: Tensors, layer: int) -> dict[str, torch.Tensor]:
    """Argument -> the layer's own input."""
    return {name.split("/")[2]: part for name, part in parts.items() if name.startswith(f"{_INPUT}/{layer}/")}


def shared_of(parts: Tensors) -> dict[str, tuple[torch.Tensor, ...]]:
    """Key -> what earlier layers have left for later ones."""
    shared: dict[str, tuple[torch.Tensor, ...]] = {}
    for name, part in parts.items():
        if name.startswith(f"{_SHARED}/"):
            key = name.split("/")[1]
            shared[key] = (*shared.get(key, ()), part)
    return shared


def after_layer(parts: Tensors, layer: int) -> dict[str, torch.Tensor]:
    """The inputs of the layers behind this one."""
    return {name: part for name, part in parts.items() if name.startswith(_INPUT) and int(name.split("/")[1]) > layer}


class PartLayout(NamedTuple):
    """One part of a state. shape: of one position. axes: of samples and positions. integers: whether it holds token ids
    or other positions of a table, which are kept as digits."""

    shape: tuple[int, ...]
    axes: tuple[int, int]
    integers: bool = False

    @property
    def width(self) -> int:
        return prod(self.shape) * (_N_DIGITS if self.integers else 1)

    def packed(self, part: torch.Tensor) -> torch.Tensor:
        """[n_samples, n_positions, width]"""
        rows = part.movedim(self.axes, (0, 1)).flatten(2) if part.dim() > 2 else part.unsqueeze(-1)
        return torch.cat([rows // _DIGIT**i % _DIGIT for i in range(_N_DIGITS)], dim=-1) if self.integers else rows

    def unpacked(self, rows: torch.Tensor) -> torch.Tensor:
        """The inverse of packed."""
        if self.integers:
            digits = rows.detach().long().chunk(_N_DIGITS, dim=-1)
            rows = torch.stack([digit * _DIGIT**i for i, digit in enumerate(digits)]).sum(0)
        return rows.reshape(*rows.shape[:2], *self.shape).movedim((0, 1), self.axes)


@dataclass(frozen=True)
class Layout:
    """The parts of a state in order."""

    parts: Mapping[str, PartLayout]

    @property
    def is_plain(self) -> bool:
        """Hidden states alone, as the model has them."""
        return len(self.parts) == 1 and self.parts[HIDDEN].axes == (0, 1) and len(self.parts[HIDDEN].shape) == 1

    def unpack(self, states: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts of states [n_samples, sequence_length, width], as the model has them."""
        if self.is_plain:
            return {HIDDEN: states}
        rows = torch.split(states, [part.width for part in self.parts.values()], dim=-1)
        return {name: part.unpacked(of) for (name, part), of in zip(self.parts.items(), rows, strict=True)}

    def to_json(self) -> list[Any]:
        return [[name, *part] for name, part in self.parts.items()]

    @classmethod
    def from_json(cls, data: list[Any]) -> "Layout":
        return cls({name: PartLayout(tuple(shape), tuple(axes), integers) for name, shape, axes, integers in data})


def pack(parts: Tensors, n_samples: int, n_positions: int) -> tuple[torch.Tensor, Layout]:
    """The parts as one tensor [n_samples, n_positions, width], and where they are in it."""
    layout = Layout({name: _described(name, part, n_samples, n_positions) for name, part in parts.items()})
    if layout.is_plain:
        return parts[HIDDEN], layout
    rows = [layout.parts[name].packed(part).to(parts[HIDDEN].dtype) for name, part in parts.items()]
    return torch.cat(rows, dim=-1), layout


def _described(name: str, part: torch.Tensor, n_samples: int, n_positions: int) -> PartLayout:
    """Keys and values, which layers share, have their heads between samples and positions, [n_samples, n_heads,
    n_positions, head_size]; in everything else these follow each other, [..., n_samples, n_positions, ...]. The name
    tells: as many heads as samples would look like either."""
    shape, integers = tuple(part.shape), not part.is_floating_point()
    between = len(shape) == 4 and (shape[0], shape[2]) == (n_samples, n_positions)
    if between and name.startswith(f"{_SHARED}/"):
        return PartLayout((shape[1], shape[3]), (0, 2), integers)
    for i in range(len(shape) - 1):
        if shape[i : i + 2] == (n_samples, n_positions):
            return PartLayout(shape[:i] + shape[i + 2 :], (i, i + 1), integers)
    raise ValueError(f"{name} of shape {list(shape)} has no place for {n_samples} samples of {n_positions} positions")
