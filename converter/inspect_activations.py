"""What `convert inspect` shows of activation statistics, and of the record of smoothing."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from calibration.activation_file import load_activations
from converter.report import table
from converter.smooth_search import SmoothedGroup
from converter.smoothing_file import load_smoothing

_IDENTITY = ("model", "revision", "corpus", "corpus_sha256", "samples", "sequence_length", "transform", "decay")


def inspect_activations(path: Path) -> dict[str, Any]:
    statistics = load_activations(path)
    tensors = [
        {
            "tensor": name,
            "matrices": len(inputs.counts),
            "unseen_matrices": int((inputs.counts == 0).sum()),
            "columns": inputs.squares.shape[1],
            **asdict(inputs.figures()),
        }
        for name, inputs in statistics.inputs.items()
    ]
    return {
        "kind": "activations",
        **{key: getattr(statistics, key) for key in _IDENTITY},
        "tensors": tensors,
        "caches": [
            {"layer": layer, "keys_absmax": float(cached.keys.max()), "values_absmax": float(cached.values.max())}
            for layer, cached in statistics.caches.items()
        ],
    }


def activation_lines(data: dict[str, Any]) -> list[str]:
    """The same for people, below its identity."""
    figures = ("absmax", "mean", "std", "percentile_99", "percentile_99_9", "outlier_ratio")
    rows = [
        [
            t["tensor"],
            *(str(t[key]) for key in ("columns", "rows", "unseen_matrices")),
            *(f"{t[key]:.4g}" for key in figures),
            f"{t['dynamic_range']:.1f}",
            f"{t['token_range']:.1f}",
        ]
        for t in data["tensors"]
    ]
    caches = [[str(c["layer"]), f"{c['keys_absmax']:.4g}", f"{c['values_absmax']:.4g}"] for c in data["caches"]]
    header = ["tensor", "columns", "rows", "unseen", "absmax", "mean", "std", "99 %", "99.9 %", "outliers x"]
    return [
        "",
        table([*header, "range, bits", "of a token"], rows),
        "",
        "outliers: the largest channel's absmax over the median one's; range: log2 of absmax over the root mean square",
        "of the median channel; of a token: the same with the root mean square of the tokens' own absmax",
        *(["", table(["layer's cache", "keys absmax", "values absmax"], caches)] if caches else []),
    ]


def inspect_smoothing(path: Path) -> dict[str, Any]:
    smoothing = load_smoothing(path)
    return {
        "kind": "smoothing",
        "model": smoothing.model,
        "revision": smoothing.revision,
        "alpha": smoothing.alpha,
        "identity": smoothing.identity(),
        "groups": smoothing_rows(smoothing.groups),
        "factors": {
            name: {"least": float(values.min()), "greatest": float(values.max()), "channels": values.shape[-1]}
            for name, values in smoothing.factors.items()
        },
    }


def smoothing_rows(groups: tuple[SmoothedGroup, ...]) -> list[dict[str, Any]]:
    """What a report keeps of smoothing: one row a group."""
    return [group.to_dict() for group in groups]


def smoothing_lines(data: dict[str, Any]) -> list[str]:
    """For people, below its identity."""
    rows = [
        [
            group["name"],
            "off" if group["alpha"] is None else f"{group['alpha']:g}",
            f"{group['outlier_ratio_before']:.1f}",
            f"{group['outlier_ratio']:.1f}",
            *("" if group[key] is None else f"{group[key]:.2e}" for key in ("error_before", "error")),
            f"{group['least']:.3g} to {group['greatest']:.3g}",
        ]
        for group in data["groups"]
    ]
    header = ["folded into", "alpha", "outliers x", "smoothed", "W8A8 error", "smoothed", "factors"]
    return ["", table(header, rows)]
