"""The command `convert inspect`: what an artifact, an importance matrix or a sensitivity table says of itself."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from calibration.activation_file import is_activations
from calibration.imatrix_file import load_imatrix
from calibration.layer_score import layer_scores
from calibration.sensitivity import MAGNITUDES, is_sensitivity, load_sensitivity
from converter.directory_artifact import DirectoryArtifact, read_recipe
from converter.importance import is_imatrix
from converter.inspect_activations import (
    activation_lines,
    inspect_activations,
    inspect_smoothing,
    smoothing_lines,
)
from converter.progress import size_text
from converter.report import table
from converter.smoothing_file import is_smoothing
from converter.super_weights import super_weight_lines
from converter.verify import artifact_files, artifact_tensors
from formats.gguf_file import read_gguf
from formats.registry import get_format

# Shown as tables, not as lines.
_TABLES = ("kind", "tensors", "layers", "super_weights", "groups", "factors")
# Whole vocabularies are no reading matter.
_LONGEST_VALUE = 200
_IDENTITY = ("model", "revision", "corpus", "corpus_sha256", "samples", "sequence_length")
_OF_LAYER = re.compile(r"blk\.(\d+)\.")


def inspect_file(path: Path) -> dict[str, Any]:
    """The file as plain data: {"kind": "imatrix", "sensitivity", "activations", "smoothing" or "artifact",
    ...}. Raises ConvertError."""
    if path.is_dir():
        return _inspect_directory(path)
    if is_activations(path):
        return inspect_activations(path)
    if is_smoothing(path):
        return inspect_smoothing(path)
    if is_sensitivity(path):
        return _inspect_sensitivity(path)
    return _inspect_imatrix(path) if is_imatrix(path) else _inspect_artifact(path)


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
    found = matrix.super_weights
    return {
        "kind": "imatrix",
        **{key: getattr(matrix, key) for key in _IDENTITY},
        "super_weights": None if found is None else json.loads(found.to_json()),
        "tensors": tensors,
    }


def _inspect_sensitivity(path: Path) -> dict[str, Any]:
    """losses: in nats a token, of the fewest bits first."""
    sensitivity = load_sensitivity(path)
    factors = sensitivity.factors
    layers = {name: int(found[1]) for name in sensitivity.losses if (found := _OF_LAYER.match(name))}
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


def _inspect_artifact(path: Path) -> dict[str, Any]:
    files = artifact_files(path)
    first = read_gguf(path)
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
    texts = {
        "imatrix": _imatrix_text,
        "sensitivity": _sensitivity_text,
        "activations": lambda data: "\n".join([*_identity_lines(data), *activation_lines(data)]),
        "smoothing": lambda data: "\n".join([*_identity_lines(data), *smoothing_lines(data)]),
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
    return "\n".join([*_identity_lines(data), "", table(header, rows), "", *super_weight_lines(data["super_weights"])])


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


def _artifact_text(data: dict[str, Any]) -> str:
    lines = [f"{key} = {value}" for key, value in data["metadata"].items()]
    counts: Counter[str] = Counter()
    for tensor in data["tensors"]:
        counts[tensor["format"]] += tensor["bytes"]
    lines += ["", table(["format", "bytes"], [[name, size_text(n)] for name, n in counts.most_common()])]
    return "\n".join([*lines, "", f"{data['files']} files, {data['bytes']} bytes ({size_text(data['bytes'])})"])
