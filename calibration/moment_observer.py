"""Seeing the second moments of every input, and its squares on the way: for calibration/second_moments.py."""

import json
import weakref
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from calibration.observer import SquaredInputs
from calibration.second_moments import EXPERT_BYTES, HELD_OUT_EVERY, HELD_OUT_SHARE, write_moments
from calibration.weights import HEAD

GROUPS_KEY = "moment groups"


class InputMoments(SquaredInputs):
    """Also sums x x' of every distinct input of a layer, and writes it to the directory when the layer is done.

    width: of the hidden states; experts whose inputs are as wide share one sum.
    shared: "PARAMETER#MATRIX" -> the name of its moments. The output head, whose products are not computed in this
    pass, has none. Sums are float32, of products of one micro-batch each, added up in their order.
    """

    def __init__(self, directory: Path, width: int, expert_bytes: int = EXPERT_BYTES) -> None:
        super().__init__()
        self.directory, self.width, self.expert_bytes = directory, width, expert_bytes
        self.shared: dict[str, str] = {}
        self._moments: dict[str, np.ndarray] = {}
        self._rows: dict[str, list[np.ndarray]] = {}
        self._n_merged = 0
        self._shown: tuple[weakref.ref[torch.Tensor], str] | None = None

    def fresh(self) -> "InputMoments":
        return InputMoments(self.directory, self.width, self.expert_bytes)

    def observe(
        self, parameter: str, matrix: int, n_matrices: int, inputs: torch.Tensor, outputs: torch.Tensor | None
    ) -> None:
        super().observe(parameter, matrix, n_matrices, inputs, outputs)
        name = f"{parameter}#{matrix}"
        group = self._group(parameter, matrix, n_matrices, inputs.shape[-1])
        if parameter == HEAD or group is None:
            return
        if self._shown is not None and self._shown[0]() is inputs:
            self.shared[name] = self._shown[1]
            return
        self.shared[name], self._shown = group, (weakref.ref(inputs), group)
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        product = (rows.T @ rows).cpu().numpy()
        if group in self._moments:  # another expert of this layer
            self._moments[group] += product
        else:
            self._moments[group] = product
        self._rows.setdefault(group, []).append(rows[::HELD_OUT_SHARE].cpu().numpy().copy())

    def _group(self, parameter: str, matrix: int, n_matrices: int, n_columns: int) -> str | None:
        if n_matrices == 1 or n_columns == self.width:
            return parameter
        return f"{parameter}#{matrix}" if 4 * n_matrices * n_columns**2 <= self.expert_bytes else None

    def merge(self, other: "SquaredInputs") -> None:
        super().merge(other)
        assert isinstance(other, InputMoments)
        self.shared |= other.shared
        held_out = self._n_merged % HELD_OUT_EVERY == 1
        self._n_merged += 1
        for group, product in other._moments.items():
            if held_out:
                self._rows.setdefault(group, []).extend(other._rows[group])
            elif group in self._moments:
                self._moments[group] += product
            else:
                self._moments[group] = product

    def to_arrays(self) -> dict[str, np.ndarray]:
        """At the end of a layer, whose moments go to the disk before the checkpoint says that it is done."""
        for group, moments in self._moments.items():
            held_out = self._rows.get(group, [np.empty((0, len(moments)), np.float32)])
            write_moments(self.directory, group, moments, np.concatenate(held_out))
        self._moments, self._rows, self._n_merged = {}, {}, 0
        return super().to_arrays() | {GROUPS_KEY: np.array(json.dumps(self.shared))}

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        sums = dict(arrays)
        if GROUPS_KEY in sums:
            self.shared = json.loads(str(sums.pop(GROUPS_KEY)))
        super().load_arrays(sums)
