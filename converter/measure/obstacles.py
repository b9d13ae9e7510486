"""What stands in the way of running a source, and what a job needs it run for: said before any work."""

from collections.abc import Collection
from enum import Enum
from pathlib import Path
from typing import NoReturn

from bitwright.converter.architectures.architecture import known_architecture
from bitwright.converter.model.gguf_map import architectures_of_gguf
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.converter.source.hub import first_line
from bitwright.formats.errors import ConvertError


class Need(Enum):
    """What a model is run for, with what does without."""

    IMPORTANCE = (
        "the importance of its columns",
        "give an importance matrix with --imatrix FILE, or choose 8 bits and more, which need none"
        " (--profile uniform-8bit)",
    )
    SENSITIVITY = (
        "its sensitivity",
        "give --sensitivity FILE, or add --no-analysis to a preset that has rules",
    )
    TEXT = (
        "what happens inside of it (super weights, error feedback, ranges of inputs)",
        "leave that out: --protect-super-weights off, --no-error-feedback, a profile that looks at no inputs",
    )
    QUALITY = ("the quality report", "add --judge off")


def check_runs(checkpoint: Checkpoint, needs: Collection[Need], predicts_tokens: bool = True) -> None:
    """Raises ConvertError where something is needed that takes running a model, and the model cannot be run.
    predicts_tokens: as of ModelMap."""
    why = obstacle(checkpoint) if needs else None
    if why is None and Need.SENSITIVITY in needs:
        why, needs = _without_gradients(checkpoint, predicts_tokens), [Need.SENSITIVITY]
    if why is None:
        return
    raise ConvertError(
        f"{why}, and this job needs it run for {' and '.join(need.value[0] for need in needs)}",
        str(checkpoint.location),
        "; ".join(need.value[1] for need in needs),
    )


def obstacle_to_analysis(checkpoint: Checkpoint, predicts_tokens: bool) -> str | None:
    """Why no gradients of the model can be had, as far as that shows without its weights; None where they can."""
    return _without_gradients(checkpoint, predicts_tokens) or obstacle(checkpoint)


def _without_gradients(checkpoint: Checkpoint, predicts_tokens: bool) -> str | None:
    if not predicts_tokens:
        return "the model embeds texts and predicts no tokens"
    architecture = known_architecture(checkpoint.config)
    return architecture.without.get("gradients") if architecture is not None else None


def obstacle(checkpoint: Checkpoint) -> str | None:
    """Why the source cannot be run, as far as that shows without its weights; None where nothing is in the way."""
    if checkpoint.metadata is None:
        architecture = known_architecture(checkpoint.config)
        return architecture.without.get("calibration") if architecture else _not_built(checkpoint.location)
    name = str(checkpoint.config["model_type"])
    if not architectures_of_gguf(name):
        return f"the architecture {name!r} has no data file here, so that transformers cannot run this GGUF"
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    if _plain(name) not in map(_plain, GGUF_SUPPORTED_ARCHITECTURES):
        return f"transformers cannot run this GGUF: it reads none of the architecture {name!r}"
    return None


def _not_built(directory: Path) -> str | None:
    """Why the layer stream cannot run what transformers builds of this configuration."""
    from bitwright.calibration.stream.model import LayerwiseModel
    from bitwright.calibration.stream.streamable import StreamableModel

    try:
        LayerwiseModel(StreamableModel(_NoWeights(), directory, device="cpu"))
    except Exception as error:  # whatever a model that is built otherwise leads to
        return f"the layer stream cannot run this model: {first_line(error)}"
    return None


class _NoWeights:
    """The source of a model whose structure alone is asked for."""

    tensors: tuple[str, ...] = ()

    def read(self, name: str) -> NoReturn:
        raise KeyError(name)


def _plain(name: str) -> str:
    return name.replace("-", "").replace("_", "").lower()
