"""What a checkpoint is made of under its own names: the tensors of a safetensors directory, in the order of its files.

A GGUF stacks experts, reorders rotary rows and adds one to some norms; a directory keeps everything as it is, experts
one by one.
"""

from dataclasses import replace
from pathlib import Path

from converter.architecture import COMPUTED
from converter.checkpoint import Checkpoint
from converter.source_config import check_unquantized
from formats.errors import ConvertError
from profiles.vocabulary import ModelMap, Role, TensorSpec


def describe_modules(checkpoint: Checkpoint, model_map: ModelMap) -> ModelMap:
    """The tensors of the checkpoint as `model_map`, which has them under the names of a GGUF, knows them; and what a
    text model does without (the image encoder of a larger one) as `other`, to be copied.

    Raises ConvertError for a GGUF: a directory takes configuration and tokenizer from the checkpoint's own files.
    """
    if checkpoint.metadata is not None:
        raise ConvertError(
            "a safetensors directory is made from a Hugging Face checkpoint, and this is a GGUF",
            str(checkpoint.location),
            "name the directory or the Hub id of the model, or a profile whose target is a GGUF",
        )
    tensors = [
        replace(
            tensor,
            name=source,
            shape=checkpoint.tensors[source].shape,
            sources=(source,),
            transform="none",
            n_heads=0,
        )
        for tensor in model_map.tensors
        for source in tensor.sources
    ]
    described = {tensor.name for tensor in tensors}
    others = {
        name: stored
        for name, stored in checkpoint.tensors.items()
        if name not in described and not COMPUTED.search(name)
    }
    check_unquantized(checkpoint.config, others, str(checkpoint.location / "config.json"))
    copied = (TensorSpec(name, stored.shape, Role.OTHER, sources=(name,)) for name, stored in others.items())
    return replace(model_map, tensors=(*tensors, *copied))


def stored_dtypes(checkpoint: Checkpoint) -> dict[str, str]:
    """Tensor -> the dtype that the checkpoint stores it in."""
    return {name: tensor.dtype for name, tensor in checkpoint.tensors.items()}


def gguf_names(model_map: ModelMap) -> dict[str, tuple[str, int]]:
    """The checkpoint's tensor -> (GGUF tensor, matrix in it): the names that importance and statistics go by."""
    return {source: (tensor.name, i) for tensor in model_map.tensors for i, source in enumerate(tensor.sources)}


def directory_name(file_name: str) -> str:
    """The artifact's name by the GGUF naming convention, as a directory's."""
    return Path(file_name).stem
