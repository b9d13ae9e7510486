"""Super weights planted in tiny models: the network really depends on them."""

import re
from pathlib import Path

import numpy as np

from bitwright.calibration.statistics.super_weights import SuperWeightReport
from bitwright.calibration.super_weights.search import stream_super_weights
from bitwright.calibration.super_weights.spikes import DownProjection
from bitwright.calibration.text.corpus import Corpus
from tests.calibration.stream.streaming import DictSource, on_cpu, random_corpus

# The token that makes the planted neurons fire; every fifth one of the texts and prompts.
TRIGGER = 17


def texts(seed: int, n_samples: int, length: int = 64) -> Corpus:
    corpus = random_corpus(n_samples=n_samples, seed=seed)
    tokens = corpus.tokens[:, :length].copy()
    tokens[:, ::5] = TRIGGER
    return Corpus(tokens, corpus.name, corpus.sha256)


def plant(
    source: DictSource, layer: int, weights: dict[tuple[int, int], float], *, expert: int | None = None, gain: float = 4
) -> None:
    """Set the down projection's weights of these rows and columns, and make the columns' neurons fire at TRIGGER.

    expert: of a qwen3_moe; the router then sends TRIGGER there.
    """
    embedding = source.tensors["model.embed_tokens.weight"][TRIGGER]
    direction = (embedding / np.linalg.norm(embedding)).astype(np.float32)
    stem = f"model.layers.{layer}.mlp."
    part = stem if expert is None else f"{stem}experts.{expert}."
    if expert is not None:
        source.tensors[f"{stem}gate.weight"][expert] = gain * direction
    for (row, column), value in weights.items():
        for kind in ("gate_proj", "up_proj"):
            if f"{part}{kind}.weight" in source.tensors:
                source.tensors[f"{part}{kind}.weight"][column] = gain * direction
        if f"{part}gate_up_proj.weight" in source.tensors:
            fused = source.tensors[f"{part}gate_up_proj.weight"]
            fused[column] = fused[len(fused) // 2 + column] = gain * direction
        source.tensors[f"{part}down_proj.weight"][row, column] = value


def projections(source: DictSource) -> list[DownProjection]:
    found = []
    for name in source.tensors:
        if match := re.fullmatch(r"model\.layers\.(\d+)\.mlp\.(?:experts\.(?:(\d+)\.)?)?down_proj(?:\.weight)?", name):
            kind = "ffn_down_exps" if ".experts." in name else "ffn_down"
            tensor, stored = f"blk.{match[1]}.{kind}.weight", source.tensors[name]
            n_matrices = len(stored) if stored.ndim == 3 else 1
            found.append(DownProjection(name, int(match[1]), tensor, int(match[2] or 0), n_matrices))
    return found


def search(directory: Path, source: DictSource, work_dir: Path, factors=None, **options) -> SuperWeightReport:
    model, control = on_cpu(source, directory, work_dir, name="tiny", **options)
    return stream_super_weights(model, projections(source), texts(1, 4).tokens, texts(2, 4), control, factors)
