"""A tiny checkpoint on disk with a super weight in it, and text that wakes it."""

import shutil
from pathlib import Path

from safetensors.numpy import save_file

from bitwright.converter.measure.running import load_tokenizer
from tests.calibration.stream.streaming import DictSource
from tests.calibration.super_weights.planted import TRIGGER, plant


def build(tiny: Path, directory: Path, layer: int, weights: dict[tuple[int, int], float], **options) -> Path:
    """The model in `tiny` with these super weights, in float32."""
    source = DictSource.of(tiny)
    plant(source, layer, weights, **options)
    shutil.copytree(tiny, directory)
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    save_file(source.tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def text(model: Path, path: Path) -> Path:
    """A text in which the token that wakes the super weight is frequent."""
    trigger = load_tokenizer(model).decode([TRIGGER])
    words = ["quick", "brown", "fox", "jumps", "over", "lazy", "dog", "wizards"]
    path.write_text(" ".join(f"{word}{trigger * (i % 3)}" for i in range(600) for word in words))
    return path
