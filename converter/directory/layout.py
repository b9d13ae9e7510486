"""The files of a safetensors directory, known to the byte before anything is encoded.

All tensors of a module follow each other, so that a module is written in one go and is on the disk or is not.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from bitwright.formats.files.safetensors import SINGLE_NAME, header
from bitwright.profiles.planning.plan_modules import ModulePlan, PlannedModule

# Of the Hub's large files: what transformers and others split at by default.
DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class ModuleEntry:
    """What is stored of one row of the plan. name: of the matrix, "model.layers.0.mlp.up_proj.weight"."""

    name: str
    n_bytes: int


@dataclass(frozen=True)
class SafetensorsLayout:
    """One file: 8 bytes of length and the JSON of that length, then the tensors without gaps."""

    file_name: str
    header: bytes
    tensors: tuple[ModuleEntry, ...]
    offsets: tuple[int, ...]
    stored: tuple[str, ...]

    @property
    def n_bytes(self) -> int:
        return len(self.header) + sum(entry.n_bytes for entry in self.tensors)


def directory_layouts(plan: ModulePlan, shard_bytes: int | None) -> list[SafetensorsLayout]:
    """The shards, of at most so many bytes of tensors each where one module is not larger by itself."""
    shards: list[list[PlannedModule]] = [[]]
    size = 0
    for row in plan.tensors:
        if size and size + row.n_bytes > (shard_bytes or DEFAULT_SHARD_BYTES):
            shards.append([])
            size = 0
        shards[-1].append(row)
        size += row.n_bytes
    if len(shards) == 1:
        return [_lay_out(SINGLE_NAME, shards[0])]
    n = len(shards)
    return [_lay_out(f"model-{i:05d}-of-{n:05d}.safetensors", rows) for i, rows in enumerate(shards, start=1)]


def index_json(layouts: Sequence[SafetensorsLayout]) -> bytes | None:
    """model.safetensors.index.json; None for a single file, which has none."""
    if len(layouts) == 1:
        return None
    weight_map = {name: layout.file_name for layout in layouts for name in layout.stored}
    total = sum(entry.n_bytes for layout in layouts for entry in layout.tensors)
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n").encode()


def _lay_out(file_name: str, rows: Sequence[PlannedModule]) -> SafetensorsLayout:
    stored = {name: entry for row in rows for name, entry in row.stored.items()}
    first = header(stored)
    ends = accumulate((row.n_bytes for row in rows), initial=len(first))
    entries = tuple(ModuleEntry(row.tensor.name, row.n_bytes) for row in rows)
    return SafetensorsLayout(file_name, first, entries, tuple(ends)[:-1], tuple(stored))
