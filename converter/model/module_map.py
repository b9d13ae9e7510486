"""What a checkpoint is made of under its own names: the tensors of a safetensors directory, in the order of its files.

A GGUF stacks experts, reorders rotary rows and adds one to some norms; a directory keeps everything as it is, experts
one by one.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from bitwright.calibration.places import Place
from bitwright.converter.architectures.architecture import known_architecture
from bitwright.converter.architectures.description import COMPUTED
from bitwright.converter.architectures.refusal import NotInLlamaCpp
from bitwright.converter.model.decoder_modules import RuntimeModule, describe_decoder, runtime_modules
from bitwright.converter.model.model_map import describe
from bitwright.converter.model.stored_rows import source_shape
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.converter.source.source_config import check_unquantized
from bitwright.formats.errors import ConvertError
from bitwright.profiles.layout import AS_STORED
from bitwright.profiles.vocabulary import ModelMap, Role, TensorSpec


def describe_for_directory(checkpoint: Checkpoint, pre_tokenizer: str | None = None) -> ModelMap:
    """What the checkpoint is made of, for an artifact under its own names: by its data file, which has those of a GGUF
    beside them, or else by transformers' model of it.

    Raises ConvertError as `describe` and `describe_decoder` do, and for a GGUF: a directory takes configuration and
    tokenizer from the checkpoint's own files.
    """
    if checkpoint.metadata is not None:
        raise ConvertError(
            "a safetensors directory is made from a Hugging Face checkpoint, and this is a GGUF",
            str(checkpoint.location),
            "name the directory or the Hub id of the model, or a profile whose target is a GGUF",
        )
    architecture = known_architecture(checkpoint.config)
    if architecture is None:
        return describe_decoder(checkpoint)
    if (why := architecture.without.get("directory")) is not None:
        raise ConvertError(
            f"no directory is made of the architecture {architecture.name!r}: {why}",
            str(checkpoint.location),
            "choose a profile whose target is a GGUF; `bitwright architectures` tells what works for which",
        )
    try:
        return describe(checkpoint, pre_tokenizer, keeps_mtp=False)
    except NotInLlamaCpp as refusal:
        described = describe_decoder(checkpoint)
        note = f"a directory can be made, and no GGUF: {refusal.what}"
        return replace(described, source_notes=(*described.source_notes, note))


def describe_modules(checkpoint: Checkpoint, model_map: ModelMap, *, by_shape: bool = False) -> ModelMap:
    """The tensors of the checkpoint as `model_map`, which may have them under the names of a GGUF, knows them; and what
    a text model does without (the image encoder of a larger one) as `other`, to be copied. Matrices that transformers
    has in no linear module, where no scheme is read, are `other`, too.

    by_shape: do without transformers, which takes seconds to import: a matrix that is stored as one is taken for a
    linear module's, unless it is looked up."""
    with_modules = known_architecture(checkpoint.config) is not None and not by_shape
    runtime = runtime_modules(checkpoint) if with_modules else {}
    tensors = {
        source: replace(
            tensor,
            name=source,
            shape=checkpoint.tensors[source].shape,
            sources=(source,),
            layout=AS_STORED,
            stored_shape=(),
        )
        for tensor in model_map.tensors
        for source in tensor.sources
    }
    if by_shape:
        runtime = {
            name: RuntimeModule(len(spec.shape) == 2 and spec.role is not Role.PER_LAYER_EMBEDDING, "")
            for name, spec in tensors.items()
        }
    tensors |= {name: _as_run(tensors[name], module) for name, module in runtime.items() if name in tensors}
    others = {
        name: stored for name, stored in checkpoint.tensors.items() if name not in tensors and not COMPUTED.search(name)
    }
    check_unquantized(checkpoint.config, others, str(checkpoint.location / "config.json"))
    copied = (TensorSpec(name, stored.shape, Role.OTHER, sources=(name,)) for name, stored in others.items())
    return replace(model_map, tensors=(*tensors.values(), *copied))


def _as_run(tensor: TensorSpec, module: RuntimeModule) -> TensorSpec:
    kept = tensor.quantizable and tensor.role is not Role.EMBEDDING and not module.is_product
    return replace(tensor, role=Role.OTHER if kept else tensor.role, module=module.name)


def stored_dtypes(checkpoint: Checkpoint) -> dict[str, str]:
    """Tensor -> the dtype that the checkpoint stores it in."""
    return {name: tensor.dtype for name, tensor in checkpoint.tensors.items()}


def places_of(tensors: Iterable[TensorSpec]) -> dict[str, tuple[Place, ...]]:
    """The checkpoint's tensor -> where its importance and statistics go among these of a GGUF."""
    places: dict[str, tuple[Place, ...]] = {}
    for tensor in tensors:
        if not tensor.layout.observed:
            continue
        rows, columns = _taken(tensor)
        for i, source in enumerate(tensor.sources):
            step = max(1, tensor.n_matrices // len(tensor.sources))
            places[source] = (*places.get(source, ()), Place(tensor.name, i * step, step, rows, columns))
    return places


def _taken(tensor: TensorSpec) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Which outputs and inputs of the products with a stored matrix the tensor has, in its order; None for all. Of a
    tensor with several matrices in one source every matrix has the same."""
    layout, shape = tensor.layout, source_shape(tensor)
    rows = None if layout.rows is None else layout.rows.indices()
    if rows is not None and len(shape) == 3:
        rows = rows[: len(rows) // shape[0]]
    columns = None if layout.columns is None else layout.columns.indices()
    return (columns, rows) if layout.transposed else (rows, columns)


def gguf_names(model_map: ModelMap) -> dict[str, tuple[Place, ...]]:
    """The checkpoint's tensor -> its places in a GGUF, by which importance and statistics go, of the whole model."""
    return places_of(model_map.tensors)
