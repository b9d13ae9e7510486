"""A tiny model whose layers are stored in codes, and the same model stored whole."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from bitwright.calibration.statistics.imatrix_file import save_imatrix
from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.converter.model.model_map import describe
from bitwright.converter.source.open import open_checkpoint
from tests import tiny_models
from tests.converter.source.quantized.stored_codes import Coded


def write_pair(directory: Path, name: str, code: Callable[[int, int], Coded]) -> tuple[Path, Path]:
    """The tiny model of that name with the matrices of its layers in codes, and whole in F32."""
    coded_dir, whole_dir = directory / "coded", directory / "whole"
    tiny_models.build(name, whole_dir)
    tiny_models.build(name, coded_dir)
    weights = load_file(whole_dir / "model.safetensors")
    coded, whole, stated = {}, {}, {}
    for stored, tensor in weights.items():
        if "layers." not in stored or tensor.dim() != 2:
            coded[stored] = whole[stored] = tensor
            continue
        made = code(*tensor.shape)
        stated = made.stated
        coded |= {stored.removesuffix("weight") + end: each.contiguous() for end, each in made.tensors.items()}
        whole[stored] = torch.from_numpy(made.values).contiguous()
    save_file(coded, coded_dir / "model.safetensors", {"format": "pt"})
    save_file(whole, whole_dir / "model.safetensors", {"format": "pt"})
    config = json.loads((coded_dir / "config.json").read_text())
    (coded_dir / "config.json").write_text(json.dumps({**config, "quantization_config": stated}))
    return coded_dir, whole_dir


def flat_importance(model: Path, directory: Path) -> Path:
    """An importance matrix in which every column matters alike: the model need not run."""
    matrices = [t for t in describe(open_checkpoint(str(model))).tensors if t.layer is not None and len(t.shape) > 1]
    sums = {t.name: np.ones((t.n_matrices, t.n_columns)) for t in matrices}
    path = directory / "imatrix.gguf"
    save_imatrix(path, ImportanceMatrix(sums, {name: np.ones(len(s), np.int64) for name, s in sums.items()}))
    return path
