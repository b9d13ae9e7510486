"""What the calibration tests share: sources of weights, tokens, and the whole model to compare with."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers

from bitwright.calibration.control import PassControl
from bitwright.calibration.passes.importance_pass import stream_importance
from bitwright.calibration.places import Place
from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.calibration.stream.streamable import StreamableModel
from bitwright.calibration.text.corpus import Corpus
from bitwright.converter.source.open import open_checkpoint
from tests.tiny_models import TINY_MODELS, VOCAB_SIZE


class DictSource:
    """A checkpoint's weights in memory, to be tampered with; `reads` counts how often each was asked for."""

    def __init__(self, tensors: dict[str, np.ndarray]):
        self.tensors, self.reads = tensors, dict.fromkeys(tensors, 0)

    @classmethod
    def of(cls, directory: Path) -> "DictSource":
        checkpoint = open_checkpoint(str(directory))
        return cls({name: checkpoint.read(name) for name in checkpoint.tensors})

    def read(self, name: str) -> np.ndarray:
        self.reads[name] += 1
        return self.tensors[name]


class BreaksAt(DictSource):
    """A source that fails when a weight is asked for, as a process that is killed leaves the stream."""

    broken_name = ""

    def read(self, name: str) -> np.ndarray:
        if name == self.broken_name:
            raise ConnectionError(name)
        return super().read(name)


class StopAfter:
    """should_stop that says so once that many layers are done."""

    def __init__(self, n_layers: int):
        self.remaining = n_layers

    def __call__(self) -> bool:
        self.remaining -= 1
        return self.remaining <= 0


def random_corpus(name: str = "llama", n_samples: int = 3, seed: int = 0) -> Corpus:
    """Samples as long as the tiny model of that name asks for; two of them or fewer are a micro-batch."""
    tokens = np.random.default_rng(seed).integers(3, VOCAB_SIZE, (n_samples, TINY_MODELS[name].n_tokens))
    return Corpus(tokens.astype(np.int32), "random", "0" * 64)


def stacked_names(tensors) -> dict[str, tuple[Place, ...]]:
    """Every matrix under its own name, the experts of a layer as the matrices of one tensor."""
    names = {}
    for name in tensors:
        expert = re.search(r"\.experts\.(\d+)\.", name)
        names[name] = (Place(re.sub(r"\.experts\.\d+\.", ".experts.", name), int(expert[1]) if expert else 0),)
    return names


def on_cpu(source, directory: Path, work_dir: Path, **options) -> tuple[StreamableModel, PassControl]:
    """The model of these weights on the CPU, and the control of a pass over it; options: of either."""
    watched = {key: options.pop(key) for key in ("progress", "should_stop") if key in options}
    return StreamableModel(source, directory, **{"device": "cpu"} | options), PassControl(work_dir, **watched)


def compute(directory: Path, work_dir: Path, *, source=None, corpus=None, moments_dir=None, **options):
    """The importance matrix of every tensor, under the checkpoint's names."""
    source = source or DictSource.of(directory)
    model, control = on_cpu(source, directory, work_dir, **options)
    return stream_importance(model, stacked_names(source.tensors), corpus or random_corpus(), control, moments_dir)


def all_bytes(matrix: ImportanceMatrix) -> bytes:
    return b"".join(matrix.sums[name].tobytes() + matrix.counts[name].tobytes() for name in sorted(matrix.sums))


def load_whole(directory: Path):
    """The model as transformers itself loads it."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="eager"
    ).eval()


def with_config(directory: Path, copy: Path, **changes) -> Path:
    """A copy of the model with another configuration."""
    shutil.copytree(directory, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    return copy
