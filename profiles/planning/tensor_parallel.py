"""Whether vLLM can cut the matrices of a plan over several GPUs (`--tensor-parallel-size`).

vLLM cuts the matrices that lead into attention or an MLP by their outputs (its ColumnParallelLinear), and those that
lead out of them by their inputs (RowParallelLinear). It wants

    heads     as many attention heads on every GPU; of keys and values, too, or where there are fewer of these heads
              than GPUs, as many GPUs for each, which has a copy
    outputs   as many on every GPU, and whole blocks in schemes with blocks of rows
    inputs    as many on every GPU, and whole groups: a GPU has the scales of its own columns alone

Embeddings and output heads are padded, and what comes before the heads of latent attention is copied: neither is cut.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import lcm

from bitwright.formats.errors import ConvertError
from bitwright.formats.schemes.registry import SCHEMES, Scheme
from bitwright.profiles.planning.fallbacks import schemes_by_shape
from bitwright.profiles.planning.plan_modules import ModulePlan, PlannedModule
from bitwright.profiles.vocabulary import Role

_KEYS_AND_VALUES = frozenset({Role.ATTENTION_KEY, Role.ATTENTION_VALUE})
# Cut by their outputs. Of a matrix that is stored as several in one, how many of one size there are; None where the
# heads alone decide.
_BY_OUTPUTS: dict[Role, int | None] = {
    **dict.fromkeys((Role.ATTENTION_QUERY, Role.ATTENTION_KEY, Role.ATTENTION_VALUE), 1),
    **dict.fromkeys((Role.ATTENTION_QUERY_UP, Role.ATTENTION_KEY_VALUE_UP), 1),
    **dict.fromkeys((Role.MLP_GATE, Role.MLP_UP, Role.EXPERT_GATE, Role.EXPERT_UP), 1),
    **dict.fromkeys((Role.SHARED_EXPERT_GATE, Role.SHARED_EXPERT_UP), 1),
    Role.MLP_GATE_UP: 2,
    Role.ATTENTION_QKV: None,
}
_BY_INPUTS = frozenset({Role.ATTENTION_OUTPUT, Role.MLP_DOWN, Role.EXPERT_DOWN, Role.SHARED_EXPERT_DOWN})
_NEVER_CUT = frozenset({Role.EMBEDDING, Role.OUTPUT, Role.ATTENTION_QUERY_DOWN, Role.ATTENTION_LATENT})


@dataclass(frozen=True)
class Heads:
    """Numbers of attention heads, and of those of keys and values, of the model; each layer's where they differ."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]


@dataclass(frozen=True)
class _Misfit:
    """Matrices of one role, scheme and shape that cannot be cut, and why. remedies: schemes of which they could."""

    names: tuple[str, ...]
    role: Role
    why: str
    remedies: tuple[str, ...]

    def __str__(self) -> str:
        others = f" and {len(self.names) - 1} like it" if len(self.names) > 1 else ""
        return f"{self.names[0]}{others}: {self.why}"


def check_tensor_parallel(plan: ModulePlan, heads: Heads, n_gpus: int) -> None:
    """Raises ConvertError where vLLM does not load the plan on so many GPUs: it names the matrices, the numbers of GPUs
    that do, and the schemes with which these would."""
    uneven, misfits = list(_uneven_heads(plan, heads, n_gpus)), _misfits(plan, heads, n_gpus)
    if not uneven and not misfits:
        return
    serving = [
        n for n in range(1, 2 * n_gpus + 1) if not any(_uneven_heads(plan, heads, n)) and not _misfits(plan, heads, n)
    ]
    remedy = f"use {' or '.join(map(str, serving))} GPU{'s' if serving != [1] else ''}"
    if not uneven and all(misfit.remedies for misfit in misfits):
        given = dict.fromkeys(f"--set '{misfit.role}={misfit.remedies[0]}'" for misfit in misfits)
        remedy += f", or other schemes: {' '.join(given)}"
    raise ConvertError(
        f"vLLM cannot cut this plan over {n_gpus} GPUs: {'; '.join([*uneven, *map(str, misfits)])}",
        f"--tensor-parallel {n_gpus}",
        remedy,
    )


def unchecked_roles(plan: ModulePlan) -> list[Role]:
    """Roles of matrices of the layers of which nothing is known here: how vLLM cuts them is the model's own."""
    known = _BY_OUTPUTS.keys() | _BY_INPUTS | _NEVER_CUT
    found = (row.tensor.role for row in plan.tensors if row.tensor.quantizable and row.tensor.layer is not None)
    return sorted(set(found) - known)


def _uneven_heads(plan: ModulePlan, heads: Heads, n_gpus: int) -> Iterator[str]:
    for n in dict.fromkeys(heads.queries):
        if n % n_gpus:
            yield f"{n} attention heads"
    if not any(row.tensor.role in _KEYS_AND_VALUES | {Role.ATTENTION_QKV} for row in plan.tensors):
        return
    for n in dict.fromkeys(heads.keys):
        if max(n, n_gpus) % min(n, n_gpus):
            yield f"{n} heads of keys and values"


def _misfits(plan: ModulePlan, heads: Heads, n_gpus: int) -> list[_Misfit]:
    if n_gpus == 1:
        return []
    found: dict[tuple[Role, str, tuple[int, ...]], list[str]] = {}
    for row in plan.tensors:
        if len(row.tensor.shape) > 1 and _why(row, row.scheme, heads, n_gpus):
            found.setdefault((row.tensor.role, row.format, row.tensor.shape), []).append(row.tensor.name)
    rows = {row.tensor.name: row for row in plan.tensors}
    return [
        _Misfit(tuple(names), role, _why(row, row.scheme, heads, n_gpus), tuple(_fitting(row, heads, n_gpus)))
        for (role, _, _), names in found.items()
        for row in [rows[names[0]]]
    ]


def _why(row: PlannedModule, scheme: Scheme | None, heads: Heads, n_gpus: int) -> str:
    """Why a matrix in this scheme, None for 16 bits, cannot be cut; empty where it can."""
    role, (n_rows, n_columns) = row.tensor.role, row.tensor.shape[-2:]
    of = row.format if scheme is None else scheme.name
    if role in _BY_INPUTS:
        return _uneven(n_columns, n_gpus, "columns", of, 1 if scheme is None else _columns_together(scheme))
    n_parts = _BY_OUTPUTS.get(role)
    if n_parts is None:
        return ""
    n_cuts = min([n_gpus, *(heads.keys if role in _KEYS_AND_VALUES else ())])  # a head is copied, and never cut
    block = None if scheme is None else scheme.weights.block_structure
    return _uneven(n_rows // n_parts, n_cuts, "rows", of, 1 if block is None else block[0])


def _uneven(n: int, n_cuts: int, what: str, of: str, multiple: int) -> str:
    """Why so many rows or columns cannot be cut into equal parts of whole multiples; empty where they can."""
    if n % n_cuts:
        return f"{n} {what}"
    if n // n_cuts % multiple:
        return f"each GPU has {n // n_cuts} of {n} {what}, and {of} needs a multiple of {multiple}"
    return ""


def _columns_together(scheme: Scheme) -> int:
    """Of what the number of columns on a GPU has to be a multiple: of a group, and of what is packed into 32 bits."""
    packed = 32 // scheme.weights.num_bits if scheme.format == "pack-quantized" else 1
    return lcm(scheme.column_multiple, packed)


def _fitting(row: PlannedModule, heads: Heads, n_gpus: int) -> Iterable[str]:
    """Schemes of the same kind in which the matrix can be cut, then its other fallbacks."""
    if (scheme := row.scheme) is None:
        return
    kind = (scheme.weights.num_bits, scheme.weights.type, scheme.weights.symmetric, scheme.activations)
    alike = (
        s.name
        for s in SCHEMES.values()
        if (s.weights.num_bits, s.weights.type, s.weights.symmetric, s.activations) == kind
    )
    n_rows, n_columns = row.tensor.shape[-2:]
    for name in dict.fromkeys([*alike, *schemes_by_shape(row.format)]):
        other = SCHEMES[name]
        if other.fits(n_rows, n_columns) and not _why(row, other, heads, n_gpus):
            yield name
