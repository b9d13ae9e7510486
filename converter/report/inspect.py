"""The command `bitwright inspect`: what an artifact, or a file that was measured of a model, says of itself, and
pictures of it."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.calibration.sensitivity.layer_score import layer_scores
from bitwright.calibration.sensitivity.table import MAGNITUDES, is_sensitivity, load_sensitivity
from bitwright.calibration.statistics.activation_file import is_activations, load_activations
from bitwright.calibration.statistics.imatrix_file import is_imatrix, load_imatrix
from bitwright.calibration.statistics.super_weights import SuperWeightReport
from bitwright.converter.artifact.directory_record import read_recipe
from bitwright.converter.artifact.ownership import Replaceable, check_places, occupied
from bitwright.converter.directory.artifact import DirectoryArtifact
from bitwright.converter.gguf.verify import artifact_files, artifact_tensors, files_of
from bitwright.converter.measure.super_weights import RESULT
from bitwright.converter.report.page import figures_page
from bitwright.converter.report.pictures import bits_figures, importance_figures, sensitivity_figures
from bitwright.converter.report.svg import MARK, Figure, svg_file
from bitwright.converter.report.text import table
from bitwright.converter.smoothing.record import is_smoothing, load_smoothing
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.gguf import GgufFile, read_gguf
from bitwright.formats.files.whole import whole_file
from bitwright.formats.registry import get_format
from bitwright.profiles.sizes import size_text

# Shown as tables, not as lines.
_TABLES = ("kind", "tensors", "layers", "super_weights", "groups", "factors")
# Whole vocabularies are no reading matter.
_LONGEST_VALUE = 200
_IDENTITY = ("model", "revision", "corpus", "corpus_sha256", "samples", "sequence_length")
_SUFFIXES = (".svg", ".html")
_OF_LAYER = re.compile(r"blk\.(\d+)\.")


def inspect_file(path: Path) -> dict[str, Any]:
    """The file as plain data: {"kind": "imatrix", "sensitivity", "activations", "smoothing" or "artifact",
    ...}. Raises ConvertError."""
    if path.is_dir():
        return _inspect_directory(path)
    if is_activations(path):
        return _inspect_activations(path)
    if is_smoothing(path):
        return _inspect_smoothing(path)
    if is_sensitivity(path):
        return _inspect_sensitivity(path)
    return _inspect_imatrix(path) if is_imatrix(path) else _inspect_artifact(read_gguf(path))


def _inspect_imatrix(path: Path) -> dict[str, Any]:
    matrix = load_imatrix(path)
    tensors = []
    for name, sums in matrix.sums.items():
        means = matrix.columns(name)
        counts = matrix.counts[name]
        tensors.append(
            {
                "tensor": name,
                "matrices": len(sums),
                "columns": sums.shape[1],
                "unseen_matrices": int((counts == 0).sum()),
                "rows": int(counts.sum()),
                "mean": float(means.mean()),
                "largest_share": float((means.max(axis=1) / np.maximum(means.sum(axis=1), 1e-30)).max()),
            }
        )
    super_weights = matrix.super_weights
    return {
        "kind": "imatrix",
        **{key: getattr(matrix, key) for key in _IDENTITY},
        "super_weights": None if super_weights is None else json.loads(super_weights.to_json()),
        "tensors": tensors,
    }


def _inspect_sensitivity(path: Path) -> dict[str, Any]:
    """losses: in nats a token, of the fewest bits first."""
    sensitivity = load_sensitivity(path)
    factors = sensitivity.factors
    layers = {name: int(match[1]) for name in sensitivity.losses if (match := _OF_LAYER.match(name))}
    tensors = [
        {
            "tensor": name,
            "layer": layers.get(name),
            "sampled_rows": sensitivity.sampled_rows[name],
            **{key: getattr(factors, key)[name] for key in MAGNITUDES},
            "losses": dict(sorted(losses.items(), key=lambda item: (get_format(item[0]).bits_per_weight, item[0]))),
        }
        for name, losses in sensitivity.losses.items()
    ]
    return {
        "kind": "sensitivity",
        **{key: getattr(factors, key) for key in (*_IDENTITY, "labels")},
        **{key: getattr(sensitivity, key) for key in ("architecture", "weights_sha256", "effort", "tool")},
        "tensors": tensors,
        "layers": [{"layer": layer, "score": score} for layer, score in layer_scores(factors, layers).items()],
    }


def _inspect_activations(path: Path) -> dict[str, Any]:
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
        **{key: getattr(statistics, key) for key in (*_IDENTITY, "transform", "decay")},
        "tensors": tensors,
        "caches": [
            {"layer": layer, "keys_absmax": float(cached.keys.max()), "values_absmax": float(cached.values.max())}
            for layer, cached in statistics.caches.items()
        ],
    }


def _inspect_smoothing(path: Path) -> dict[str, Any]:
    smoothing = load_smoothing(path)
    return {
        "kind": "smoothing",
        "model": smoothing.model,
        "revision": smoothing.revision,
        "alpha": smoothing.alpha,
        "identity": smoothing.identity(),
        "groups": [group.to_dict() for group in smoothing.groups],
        "factors": {
            name: {"least": float(values.min()), "greatest": float(values.max()), "channels": values.shape[-1]}
            for name, values in smoothing.factors.items()
        },
    }


def _inspect_artifact(named: GgufFile) -> dict[str, Any]:
    files = files_of(named)
    first = named if files[0] == named.path else read_gguf(files[0])
    metadata = {}
    for key, field in first.fields.items():
        long = field.size > _LONGEST_VALUE
        metadata[key] = f"({field.size} {'values' if field.is_array else 'bytes'})" if long else first.contents(key)
    tensors = [
        {"tensor": t.name, "shape": list(t.shape), "format": t.ggml_type.name, "bytes": t.n_bytes}
        for t in artifact_tensors(files).values()
    ]
    n_bytes = sum(file.stat().st_size for file in files)
    return {"kind": "artifact", "files": len(files), "bytes": n_bytes, "metadata": metadata, "tensors": tensors}


def _inspect_directory(directory: Path) -> dict[str, Any]:
    recipe = read_recipe(directory)
    artifact = DirectoryArtifact.of_recipe(directory)
    files = [path for path in directory.iterdir() if path.suffix == ".safetensors"]
    return {
        "kind": "artifact",
        "files": len(files),
        "bytes": sum(path.stat().st_size for path in files),
        "metadata": {f"bitwright.{key}": value for key, value in recipe["recipe"].items()},
        "tensors": [
            {"tensor": name, "shape": list(shape), "format": format_name, "bytes": artifact.n_bytes(name)}
            for name, (format_name, shape) in artifact.tensors.items()
        ],
    }


def inspect_text(data: dict[str, Any]) -> str:
    """The same for people."""
    texts: dict[str, Callable[[dict[str, Any]], str]] = {
        "imatrix": _imatrix_text,
        "sensitivity": _sensitivity_text,
        "activations": _activations_text,
        "smoothing": _smoothing_text,
        "artifact": _artifact_text,
    }
    return texts[data["kind"]](data)


def _identity_lines(data: dict[str, Any]) -> list[str]:
    return [f"{key}: {value}" for key, value in data.items() if key not in _TABLES]


def _imatrix_text(data: dict[str, Any]) -> str:
    rows = [
        [
            t["tensor"],
            *(str(t[key]) for key in ("matrices", "columns", "rows", "unseen_matrices")),
            f"{t['mean']:.4g}",
            f"{t['largest_share']:.1%}",
        ]
        for t in data["tensors"]
    ]
    header = ["tensor", "matrices", "columns", "rows", "unseen", "mean square", "largest column"]
    return "\n".join([*_identity_lines(data), "", table(header, rows), "", *_super_weight_lines(data["super_weights"])])


def _sensitivity_text(data: dict[str, Any]) -> str:
    formats = {name: get_format(name).bits_per_weight for t in data["tensors"] for name in t["losses"]}
    names = sorted(formats, key=lambda name: (formats[name], name))
    rows = [
        [
            t["tensor"],
            str(t["sampled_rows"]),
            *(f"{1000 * t['losses'][f]:.3g}" if f in t["losses"] else "" for f in names),
        ]
        for t in data["tensors"]
    ]
    scores = [[str(layer["layer"]), f"{layer['score']:.3f}"] for layer in data["layers"]]
    return "\n".join(
        [
            *_identity_lines(data),
            "",
            table(["layer", "score"], scores),
            "",
            "expected increase of the mean KL divergence, in thousandths of a nat a token:",
            table(["tensor", "rows", *names], rows),
        ]
    )


def _activations_text(data: dict[str, Any]) -> str:
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
    lines = [
        *_identity_lines(data),
        "",
        table([*header, "range, bits", "of a token"], rows),
        "",
        "outliers: the largest channel's absmax over the median one's; range: log2 of absmax over the root mean square",
        "of the median channel; of a token: the same with the root mean square of the tokens' own absmax",
        *(["", table(["layer's cache", "keys absmax", "values absmax"], caches)] if caches else []),
    ]
    return "\n".join(lines)


def _smoothing_text(data: dict[str, Any]) -> str:
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
    return "\n".join([*_identity_lines(data), "", table(header, rows)])


def _artifact_text(data: dict[str, Any]) -> str:
    lines = [f"{key} = {value}" for key, value in data["metadata"].items()]
    counts: Counter[str] = Counter()
    for tensor in data["tensors"]:
        counts[tensor["format"]] += tensor["bytes"]
    lines += ["", table(["format", "bytes"], [[name, size_text(n)] for name, n in counts.most_common()])]
    return "\n".join([*lines, "", f"{data['files']} files, {data['bytes']} bytes ({size_text(data['bytes'])})"])


def _super_weight_lines(report: dict[str, Any] | None) -> list[str]:
    """What was found, for people; report: SuperWeightReport.to_json as plain data."""
    if report is None:
        return ["super weights: nobody has looked; `bitwright imatrix --super-weights MODEL` does"]
    looked = (
        f"looked {report['looks']} times at {report['prompts']} sequences of {report['prompt_length']} tokens, for"
        f" weights whose row and column spike to {report['spike_ratio']:g} times the median"
    )
    measured = ""
    if report["perplexity"] is not None:
        measured = (
            f"removals measured on {report['samples']} x {report['sequence_length']} tokens of {report['corpus']},"
            f" perplexity {report['perplexity']:.3f}; confirmed from {report['least_divergence']:g} nats on"
        )
    if not report["weights"]:
        lines = [f"super weights: none; {len(report['rejected'])} candidates", looked]
        spikes = [
            [str(s["layer"]), f"{s['row']} x{s['row_ratio']:.1f}", f"{s['column']} x{s['column_ratio']:.1f}"]
            for s in report["largest_spikes"]
        ]
        return [*lines, *filter(None, [measured]), "", table(["layer", "largest row", "largest column"], spikes)]
    rows = [_weight_row(weight, "yes") for weight in report["weights"]]
    rows += [_weight_row(weight, "no") for weight in report["rejected"]]
    header = ["tensor", "expert", "row", "column", "value", "without: KLD", "loss", "row x", "column x", "confirmed"]
    lines = [f"super weights: {len(report['weights'])}", looked, measured, "", table(header, rows)]
    for joint in report["joint_sets"]:
        places = ", ".join(f"{m['tensor']}[{m['row']},{m['column']}]" for m in joint["members"])
        lines.append(f"together ({joint['why']}): KLD {joint['divergence_when_removed']:.4f} without {places}")
    if report["untried"]:
        lines.append(f"{report['untried']} weaker candidates were not tried")
    return lines


def _weight_row(weight: dict[str, Any], confirmed: str) -> list[str]:
    return [
        weight["tensor"],
        *(str(weight[key]) for key in ("matrix", "row", "column")),
        f"{weight['value']:.4g}",
        f"{weight['divergence_when_removed']:.4f}",
        f"{weight['loss_when_removed']:+.4f}",
        f"{weight['row_ratio']:.0f}",
        f"{weight['column_ratio']:.0f}",
        confirmed,
    ]


def plot_file(path: Path, output: Path) -> None:
    """Write the pictures of a file as an .svg, or as a page. Pictures that an earlier call has written are replaced,
    and nothing else. Raises ConvertError for what has none."""
    if output.suffix not in _SUFFIXES:
        raise ConvertError(f"{output.suffix or 'no suffix'} is no kind of picture", str(output), "write .svg or .html")
    figures = _figures_of(path)
    if not figures:
        raise ConvertError("there is nothing to draw: no tensor of a layer", str(path), "name another file")
    check_places([path], [output])
    replaceable = Replaceable()
    if _is_picture(output):
        replaceable.allow([output])
    elif os.path.lexists(output):
        raise occupied(output, "name another file with --plot, or remove this one")
    text = svg_file(figures) if output.suffix == ".svg" else figures_page(path.name, figures)
    with whole_file(output, "picture", place=replaceable.put) as file:
        file.write(text.encode())


def _is_picture(path: Path) -> bool:
    """Whether plot_file has written this: a picture says so in its beginning."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return MARK.encode() in file.read(4096)


def _figures_of(path: Path) -> list[Figure]:
    if is_imatrix(path):
        matrix = load_imatrix(path)
        known = matrix.super_weights or _super_weights_beside(path, matrix.model)
        return importance_figures(matrix, known.weights if known is not None else ())
    if is_sensitivity(path):
        return sensitivity_figures(load_sensitivity(path).losses)
    tensors = artifact_tensors(artifact_files(path)).values()
    return bits_figures(
        {t.name: (t.ggml_type.name, 8 * t.n_bytes / (t.n_rows * t.shape[-1])) for t in tensors if len(t.shape) > 1}
    )


def _super_weights_beside(path: Path, model: str | None) -> SuperWeightReport | None:
    """The search for the same model's super weights, where the file lies in the work directory that has one."""
    result = path.with_name(RESULT)
    if not result.exists():
        return None
    report = SuperWeightReport.from_json(result.read_text(encoding="utf-8"), str(result))
    return report if report.model == model else None
