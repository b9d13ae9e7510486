"""The command `convert inspect`: what a GGUF artifact or an importance matrix says of itself."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from calibration.imatrix_file import load_imatrix
from converter.importance import is_imatrix
from converter.progress import size_text
from converter.report import table
from converter.verify import artifact_files, artifact_tensors
from formats.gguf_file import read_gguf

# Whole vocabularies are no reading matter.
_LONGEST_VALUE = 200


def inspect_file(path: Path) -> dict[str, Any]:
    """The file as plain data: {"kind": "imatrix", ...} or {"kind": "artifact", ...}. Raises ConvertError."""
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
    identity = ("model", "revision", "corpus", "corpus_sha256", "samples", "sequence_length")
    return {"kind": "imatrix", **{key: getattr(matrix, key) for key in identity}, "tensors": tensors}


def _inspect_artifact(path: Path) -> dict[str, Any]:
    files = artifact_files(path)
    fields = read_gguf(path).fields
    metadata = {}
    for key, field in fields.items():
        if not key.startswith("GGUF."):
            value = field.contents()
            long = isinstance(value, str | list) and len(value) > _LONGEST_VALUE
            metadata[key] = f"({len(value)} {'characters' if isinstance(value, str) else 'values'})" if long else value
    tensors = [
        {"tensor": t.name, "shape": list(t.shape), "format": t.ggml_type.name, "bytes": t.n_bytes}
        for t in artifact_tensors(files).values()
    ]
    n_bytes = sum(file.stat().st_size for file in files)
    return {"kind": "artifact", "files": len(files), "bytes": n_bytes, "metadata": metadata, "tensors": tensors}


def inspect_text(data: dict[str, Any]) -> str:
    """The same for people."""
    if data["kind"] == "imatrix":
        identity = [f"{key}: {value}" for key, value in data.items() if key not in ("kind", "tensors")]
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
        return "\n".join([*identity, "", table(header, rows)])
    lines = [f"{key} = {value}" for key, value in data["metadata"].items()]
    counts: Counter[str] = Counter()
    for tensor in data["tensors"]:
        counts[tensor["format"]] += tensor["bytes"]
    lines += ["", table(["format", "bytes"], [[name, size_text(n)] for name, n in counts.most_common()])]
    return "\n".join([*lines, "", f"{data['files']} files, {data['bytes']} bytes ({size_text(data['bytes'])})"])
