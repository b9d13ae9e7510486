"""Super weights planted in tiny models: the network really depends on them."""

import re
from pathlib import Path

import numpy as np

from calibration.corpus import Corpus
from calibration.spikes import DownProjection
from calibration.super_weight_search import find_super_weights
from calibration.super_weights import SuperWeightReport
from tests.calibration.streaming import DictSource, random_corpus

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
            found.append(DownProjection(name, int(match[1]), f"blk.{match[1]}.{kind}.weight", int(match[2] or 0)))
    return found


def search(directory: Path, source: DictSource, work_dir: Path, **options) -> SuperWeightReport:
    prompts = texts(1, 4).tokens
    return find_super_weights(
        source,
        directory,
        projections(source),
        prompts,
        texts(2, 4),
        work_dir=work_dir,
        model="tiny",
        device="cpu",
        **options,
    )
