"""Where the bytes and the errors of an artifact are: by layer, and beside the same model in one format throughout."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from converter.verify import TensorError
from formats.registry import FORMATS
from profiles.assign import fitting_format
from profiles.plan import Plan, PlannedTensor
from profiles.vocabulary import ModelMap


def layer_rows(plan: Plan, errors: Sequence[TensorError]) -> list[dict[str, Any]]:
    """For every layer, and for all that lies outside of them (layer None): weights, bytes, bits and errors.

    The errors are means over weights of the tensors' relative errors; tensors that are never quantized do not count.
    """
    by_name = {error.tensor: error for error in errors}
    layers: dict[int | None, list[PlannedTensor]] = {}
    for planned in plan.tensors:
        layers.setdefault(planned.tensor.layer, []).append(planned)
    rows = []
    for layer in sorted(layers, key=lambda index: (index is None, index)):
        members = layers[layer]
        n_bytes, n_weights = sum(p.n_bytes for p in members), sum(p.tensor.n_weights for p in members)
        matrices = [p for p in members if p.tensor.quantizable and p.tensor.name in by_name]
        formats: Counter[str] = Counter()
        for planned in matrices:
            formats[planned.format] += planned.tensor.n_weights
        total = sum(p.tensor.n_weights for p in matrices)
        rows.append(
            {
                "layer": layer,
                "weights": n_weights,
                "bytes": n_bytes,
                "bits_per_weight": n_bytes * 8 / n_weights,
                "share": n_bytes / plan.n_bytes,
                "formats": {name: count / total for name, count in formats.most_common()},
                **{
                    kind: sum(getattr(by_name[p.tensor.name], kind) * p.tensor.n_weights for p in matrices) / total
                    if total
                    else 0.0
                    for kind in ("relative_error", "weighted_error")
                },
            }
        )
    return rows


def uniform_sizes(model_map: ModelMap) -> list[dict[str, Any]]:
    """Bytes of tensor data of the model in each format throughout, and the share of quantized weights that fit it.

    What does not fit becomes what a plan would make of it; what is never quantized stays in F32.
    """
    rows = []
    for wanted in FORMATS.values():
        n_bytes = n_fitting = n_weights = 0
        for tensor in model_map.tensors:
            chosen = fitting_format(wanted, tensor.n_columns) if tensor.quantizable else FORMATS["F32"]
            n_bytes += tensor.n_rows * chosen.row_bytes(tensor.n_columns)
            if tensor.quantizable:
                n_weights += tensor.n_weights
                n_fitting += tensor.n_weights if chosen is wanted else 0
        rows.append({"format": wanted.name, "bytes": n_bytes, "fits": n_fitting / n_weights if n_weights else 0.0})
    return rows
