"""What can be seen of a model by layer and role: importance, coverage of experts, sensitivity, bits, errors."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.calibration.statistics.super_weights import SuperWeight
from bitwright.converter.model.gguf_roles import layer_of, role_of
from bitwright.converter.report.svg import Figure, Grid, Scale, columns_chart, heat_map, short
from bitwright.profiles.vocabulary import Role

# What a column of a heat map is called below the group of its role.
_SHORT = {"query": "Q", "key": "K", "value": "V", "output": "out", "qkv": "QKV", "gate_up": "gate+up"}
_GROUPS = (("attention", "attention"), ("mlp", "MLP"), ("shared_expert", "shared"), ("expert", "experts"))
# Of the tensors outside of layers, whose values are told in a note.
_MOST_NAMED = 6
_MOST_UNCOVERED_NAMED = 12


@dataclass(frozen=True)
class Cell:
    """A value of a tensor: where it stands, and what is said of it."""

    tensor: str
    role: Role
    layer: int | None
    value: float
    text: str = ""


def cell_of(tensor: str, value: float, text: str = "") -> Cell | None:
    """The place of a GGUF tensor by its name; None for one that says nothing."""
    role = role_of(tensor)
    return None if role is None else Cell(tensor, role, layer_of(tensor), value, text)


def by_layer_and_role(
    title: str,
    description: str,
    cells: Sequence[Cell],
    *,
    logarithmic: bool = True,
    legend: str = "",
    marked: Iterable[tuple[int, Role]] = (),
    notes: Sequence[str] = (),
) -> Figure | None:
    """A heat map of layers by roles; what lies outside of the layers is told below. None when there is no layer."""
    inside = [cell for cell in cells if cell.layer is not None]
    if not inside:
        return None
    order = list(Role)
    roles = sorted({cell.role for cell in inside}, key=order.index)
    layers = range(max(cell.layer or 0 for cell in inside) + 1)
    placed = {(cell.layer, cell.role): cell for cell in inside}
    rows = [(str(i), [placed[i, r].value if (i, r) in placed else None for r in roles]) for i in layers]
    outside = [f"{c.tensor} {c.text or short(c.value)}" for c in cells if c.layer is None][:_MOST_NAMED]

    def tooltip(i: int, j: int) -> str:
        cell = placed.get((layers[i], roles[j]))
        return f"layer {layers[i]}: none" if cell is None else f"{cell.tensor}: {cell.text or short(cell.value)}"

    return heat_map(
        title,
        description,
        Grid(
            [_label(role)[1] for role in roles],
            rows,
            column_groups=_spans([_label(role)[0] for role in roles]),
            marks=[(layer, roles.index(role)) for layer, role in marked if role in roles],
            tooltip=tooltip,
        ),
        Scale.of([cell.value for cell in inside], logarithmic=logarithmic),
        notes=[*(["Outside of the layers: " + ", ".join(outside) + "."] if outside else []), *notes],
        legend=legend,
    )


def importance_figures(matrix: ImportanceMatrix, super_weights: Sequence[SuperWeight] = ()) -> list[Figure]:
    """Importance by layer and role with super weights ringed, the largest column's share, coverage of experts."""
    means = {name: matrix.columns(name) for name in matrix.sums}
    marked, notes = super_weight_marks(super_weights)
    figures = [
        by_layer_and_role(
            "Importance",
            "The mean squared input of every matrix, over its columns, by layer and role.",
            _cells({name: float(columns.mean()) for name, columns in means.items()}),
            legend="mean squared input (stronger is larger, logarithmic)",
            marked=marked,
            notes=notes,
        ),
        by_layer_and_role(
            "Share of the largest column",
            "How much of a matrix's importance lies in its one most important column; outliers stand out.",
            _cells({n: float((c.max(axis=1) / np.maximum(c.sum(axis=1), 1e-30)).max()) for n, c in means.items()}),
            legend="share of the sum over all columns (logarithmic)",
        ),
        coverage_figure(matrix),
    ]
    return [figure for figure in figures if figure is not None]


def coverage_figure(matrix: ImportanceMatrix) -> Figure | None:
    """Tokens that reached each expert, by layer; experts that none reached are filled in another colour."""
    layers: dict[int, np.ndarray] = {}
    for name, counts in matrix.counts.items():
        cell = cell_of(name, 0.0)
        if cell is not None and cell.layer is not None and len(counts) > 1:
            layers.setdefault(cell.layer, counts)
    if not layers:
        return None
    order = sorted(layers)
    uncovered = [(i, e) for i, layer in enumerate(order) for e in np.flatnonzero(layers[layer] == 0).tolist()]
    reached = [int(count) for counts in layers.values() for count in counts if count]
    n_experts = max(map(len, layers.values()))
    total = sum(map(len, layers.values()))
    named = ", ".join(f"{order[i]}/{e}" for i, e in uncovered[:_MOST_UNCOVERED_NAMED])
    more = f" and {len(uncovered) - _MOST_UNCOVERED_NAMED} more" if len(uncovered) > _MOST_UNCOVERED_NAMED else ""
    note = f"Reached by no token: {len(uncovered)} of {total} (layer/expert: {named}{more})."
    return heat_map(
        "Coverage of experts",
        f"Calibration tokens that reached each of {n_experts} experts, by layer.",
        Grid(
            [str(e) for e in range(n_experts)],
            [(str(layer), [float(count) for count in layers[layer]]) for layer in order],
            missing=uncovered,
            tooltip=lambda i, e: f"layer {order[i]}, expert {e}: {layers[order[i]][e]} tokens",
        ),
        Scale.of(reached or [0], logarithmic=True, text=lambda value: f"{value:.0f}"),
        notes=[
            note if uncovered else f"Every one of {total} experts was reached; the rarest by {min(reached)} tokens."
        ],
        legend="tokens (logarithmic); columns are experts",
    )


def sensitivity_figures(
    losses: Mapping[str, Mapping[str, float]], super_weights: Sequence[SuperWeight] = ()
) -> list[Figure]:
    """The expected increase of the KL divergence by layer and role, and summed by layer, in one format.

    losses: GGUF tensor -> format -> nats a token. The format is the one that most tensors can have; of several the one
    whose total is the median: neither lossless nor hopeless.
    """
    chosen = representative_format(losses)
    marked, notes = super_weight_marks(super_weights)
    cells = _cells({name: by_format[chosen] for name, by_format in losses.items() if chosen in by_format})
    by_role = by_layer_and_role(
        f"Sensitivity in {chosen}",
        f"Expected increase of the mean KL divergence when one tensor is {chosen}, by layer and role.",
        cells,
        legend="nats a token (stronger costs more, logarithmic)",
        marked=marked,
        notes=notes,
    )
    if by_role is None:
        return []
    totals = layer_totals(cells)
    by_layer = columns_chart(
        f"Sensitivity in {chosen}, whole layers",
        f"Expected increase of the mean KL divergence when all of a layer is {chosen}.",
        totals,
        text=short,
        logarithmic=True,
        notes=["Nats a token, on a logarithmic axis."],
    )
    return [by_role, by_layer]


def bits_figures(formats: Mapping[str, tuple[str, float]]) -> list[Figure]:
    """Bits a weight by layer and role; formats: GGUF tensor -> (its format, bits a weight)."""
    placed = [cell_of(name, bits, f"{kind}, {short(bits)} bits") for name, (kind, bits) in formats.items()]
    figure = bits_figure([cell for cell in placed if cell is not None])
    return [figure] if figure is not None else []


def bits_figure(cells: Sequence[Cell]) -> Figure | None:
    return by_layer_and_role(
        "Bits a weight",
        "Bits a weight of every matrix, by layer and role.",
        cells,
        logarithmic=False,
        legend="bits (stronger is more)",
    )


def representative_format(losses: Mapping[str, Mapping[str, float]]) -> str:
    totals: dict[str, list[float]] = {}
    for by_format in losses.values():
        for name, loss in by_format.items():
            totals.setdefault(name, []).append(loss)
    most = max(map(len, totals.values()))
    ranked = sorted((sum(losses_of), name) for name, losses_of in totals.items() if len(losses_of) == most)
    return ranked[len(ranked) // 2][1]


def layer_totals(cells: Sequence[Cell]) -> list[float]:
    """The sum over the cells of each layer, of which there has to be one."""
    totals = [0.0] * (1 + max(cell.layer for cell in cells if cell.layer is not None))
    for cell in cells:
        if cell.layer is not None:
            totals[cell.layer] += cell.value
    return totals


def super_weight_marks(super_weights: Sequence[SuperWeight]) -> tuple[list[tuple[int, Role]], list[str]]:
    """Where to ring a heat map of layers by roles, and the lines that give the coordinates."""
    marked, notes = [], []
    for weight in super_weights:
        cell = cell_of(weight.tensor, weight.value)
        if cell is not None and cell.layer is not None:
            marked.append((cell.layer, cell.role))
        notes.append(
            f"Super weight {_coordinates(weight)} = {short(weight.value)};"
            f" loss when removed {weight.loss_when_removed:+.3g}."
        )
    return marked, notes


def _coordinates(weight: SuperWeight) -> str:
    expert = f"{weight.matrix}, " if "_exps." in weight.tensor else ""
    return f"{weight.tensor} [{expert}{weight.row}, {weight.column}]"


def _cells(values: Mapping[str, float]) -> list[Cell]:
    return [cell for name, value in values.items() if (cell := cell_of(name, value)) is not None]


def _label(role: Role) -> tuple[str, str]:
    """The group of a role, and its name in the group."""
    for prefix, group in _GROUPS:
        if role.startswith(f"{prefix}_"):
            name = role.removeprefix(f"{prefix}_")
            return group, _SHORT.get(name, name.replace("_", " "))
    return "", role.replace("_", " ")


def _spans(groups: Sequence[str]) -> list[tuple[str, int]]:
    spans: list[tuple[str, int]] = []
    for group in groups:
        if spans and spans[-1][0] == group:
            spans[-1] = (group, spans[-1][1] + 1)
        else:
            spans.append((group, 1))
    return spans
