"""An observer of the second moments of every input, and of its squares on the way; see statistics/second_moments.py."""

import json
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np
import torch

from bitwright.calibration.statistics.quarter_sums import add_quarters
from bitwright.calibration.statistics.second_moments import (
    EXPERT_BYTES,
    held_out_share,
    row_share,
    thinned,
    write_moments,
    write_partial,
)
from bitwright.calibration.stream.micro_batches import Excerpt, is_held_out, samples_of_a_group
from bitwright.calibration.stream.observer import SquaredInputs
from bitwright.calibration.stream.weights import HEAD

GROUPS_KEY = "moment groups"


class InputMoments(SquaredInputs):
    """Also sums x x' of every distinct input of a layer, and writes it to the directory when the layer is done.

    width: of the hidden states; experts whose inputs are as wide share one sum. n_tokens: of the text.
    shared: "PARAMETER#MATRIX" -> the name of its moments. The output head, whose products are not computed in this
    pass, has none. Sums are float32, of products of one micro-batch each, added up in their order to those of groups,
    and these by quarters, on the device that computes them until the layer is done. Of samples that are held out
    rows are kept instead. excerpt: of the text; apart: it is not all of it, and what is written is partial, see
    statistics/second_moments.py.
    """

    def __init__(
        self,
        directory: Path,
        width: int,
        n_tokens: int,
        expert_bytes: int = EXPERT_BYTES,
        *,
        excerpt: Excerpt | None = None,
        apart: bool = False,
    ) -> None:
        super().__init__(excerpt, apart)
        self.directory, self.width, self.n_tokens, self.expert_bytes = directory, width, n_tokens, expert_bytes
        self.holds_out = False
        self.shared: dict[str, str] = {}
        self._products: dict[str, torch.Tensor] = {}  # of a micro-batch
        self._sums: dict[str, dict[int, torch.Tensor]] = {}
        self._latest_group = 0
        self._rows: dict[str, list[torch.Tensor]] = {}
        self._shown: tuple[weakref.ref[torch.Tensor], str] | None = None

    def fresh(self, first: int) -> Self:
        observer = type(self)(self.directory, self.width, self.n_tokens, self.expert_bytes)
        observer.holds_out, observer.first = is_held_out(first), first
        return observer

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
        if self.holds_out:
            self._rows.setdefault(group, []).append(_share(inputs, held_out_share(self.n_tokens)).clone())
            return
        # An expert that sums its own rows may have few.
        rows = _share(inputs, row_share(self.n_tokens, inputs.shape[-1]) if group == parameter else 1)
        product = rows.T @ rows
        if group in self._products:  # another expert of this layer
            self._products[group] += product
        else:
            self._products[group] = product

    def _group(self, parameter: str, matrix: int, n_matrices: int, n_columns: int) -> str | None:
        if n_matrices == 1 or n_columns == self.width:
            return parameter
        return f"{parameter}#{matrix}" if 4 * n_matrices * n_columns**2 <= self.expert_bytes else None

    def move_to(self, device: torch.device) -> None:
        super().move_to(device)
        self._products = {group: product.to(device) for group, product in self._products.items()}
        self._rows = {group: [of.to(device) for of in rows] for group, rows in self._rows.items()}

    def merge(self, other: Self) -> None:
        super().merge(other)
        self.shared |= other.shared
        for group, rows in other._rows.items():
            self._rows.setdefault(group, []).extend(rows)
        group_of_text = self.grouped.group_of(other.first)
        if group_of_text != self._latest_group:
            self._add_quarters(group_of_text)
            self._latest_group = group_of_text
        for group, product in other._products.items():
            sums = self._sums.setdefault(group, {})
            if group_of_text in sums:
                sums[group_of_text] += product
            else:
                sums[group_of_text] = product

    def _add_quarters(self, stop: int | None = None) -> None:
        """stop: the first group of the text that is not done; None where all of the excerpt's are."""
        groups = self.grouped.all_groups
        for sums in self._sums.values():
            add_quarters(sums, groups.start, groups.stop if stop is None else stop)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """At the end of a layer, whose moments go to the disk before the checkpoint says that it is done."""
        with torch.inference_mode():  # the sums were made in it
            self._add_quarters()
        for group, sums in self._sums.items():
            matrices = {first: matrix.cpu().numpy() for first, matrix in sums.items()}
            rows = torch.cat(self._rows.get(group, [next(iter(sums.values()))[:0]])).cpu().numpy()
            if self.grouped.apart:
                write_partial(self.directory, group, matrices, rows)
            else:
                (matrix,) = matrices.values()
                write_moments(self.directory, group, matrix, thinned(rows))
        held_out_alone = self._rows.keys() - self._sums.keys()
        if self.grouped.apart:  # another part may have a sum to which the rows belong
            for group in held_out_alone:
                write_partial(self.directory, group, {}, torch.cat(self._rows[group]).cpu().numpy())
        else:
            self.shared = {name: group for name, group in self.shared.items() if group not in held_out_alone}
        self._sums, self._rows, self._latest_group = {}, {}, 0
        return super().to_arrays() | {GROUPS_KEY: np.array(json.dumps(self.shared))}

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        sums = dict(arrays)
        if GROUPS_KEY in sums:
            self.shared = json.loads(str(sums.pop(GROUPS_KEY)))
        super().load_arrays(sums)


def _share(inputs: torch.Tensor, step: int) -> torch.Tensor:
    """One row of so many, float32 [n, n_columns]: of each group of samples that a CPU takes at once, so that no device
    decides which. inputs: [n_samples, sequence_length, n_columns], or the rows of an expert [n, n_columns]."""
    rows = inputs.reshape(-1, inputs.shape[-1]).float()
    of_group = len(rows) if inputs.dim() < 3 else samples_of_a_group(inputs.shape[1]) * inputs.shape[1]
    if len(rows) <= of_group:
        return rows[::step]
    return torch.cat([group[::step] for group in torch.split(rows, of_group)])
