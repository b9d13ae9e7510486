"""A GGUF file in F32, F16 or BF16 as the source: its tensors and metadata are taken over as they are."""

from pathlib import Path

from gguf import Keys
from gguf.gguf_writer import GGUFValue

from converter.architecture import Architecture, architectures, gguf_name, gguf_name_map
from converter.checkpoint import DTYPE_BYTES, Checkpoint, StoredTensor
from converter.rope import FREQUENCIES, LONG_FACTORS, SHORT_FACTORS
from formats.errors import ConvertError, nearest
from formats.gguf_file import EncodedTensor, TensorEntry, read_gguf
from formats.regular_file import open_regular
from profiles.vocabulary import ModelMap, Role, TensorSpec

# What the writer states about the new file itself.
_WRITERS_KEYS = (Keys.General.FILE_TYPE, Keys.General.QUANTIZATION_VERSION, Keys.General.ALIGNMENT)


def open_gguf(path: Path) -> Checkpoint:
    """The GGUF file as a checkpoint. Raises ConvertError for a file that is no GGUF, is cut short or malformed, for one
    of several splits, and for quantized tensors."""
    with open_regular(path) as file:
        if file.read(4) != b"GGUF":
            raise ConvertError("this file is no GGUF", str(path), "give a GGUF file or the directory of a checkpoint")
    reader = read_gguf(path)
    if (reader.value(Keys.Split.LLM_KV_SPLIT_COUNT, int) or 1) > 1:
        raise ConvertError(
            "this is one of several splits of a model", str(path), "merge them first: llama-gguf-split --merge"
        )
    tensors = {}
    for tensor in reader.tensors:
        dtype = tensor.ggml_type.name
        if dtype not in DTYPE_BYTES:
            raise ConvertError(
                f"{tensor.name!r} is quantized already ({dtype}); quantizing rounded weights again adds the errors up",
                str(path),
                "convert from the original checkpoint, or from its GGUF in F32, F16 or BF16",
            )
        tensors[tensor.name] = StoredTensor(dtype, tensor.shape, path, tensor.offset)
    config = {"model_type": reader.value(Keys.General.ARCHITECTURE, str)}
    return Checkpoint(path, path.stem, None, config, tensors, reader.metadata())


def open_parts(path: Path) -> tuple[dict[str, GGUFValue], dict[str, EncodedTensor], list[TensorEntry]]:
    """What a GGUF file in one piece consists of, to lay it out anew: key-values, tensors by name, and their entries in
    the file's order. Raises ConvertError for one of several splits, and as read_gguf does."""
    reader = read_gguf(path)
    metadata = reader.metadata()
    if Keys.Split.LLM_KV_SPLIT_COUNT in metadata:
        raise ConvertError(
            "this is one of several splits of a model", str(path), "merge them: llama-gguf-split --merge"
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    entries = [TensorEntry(t.name, t.shape, int(t.ggml_type), t.n_bytes) for t in reader.tensors]
    return metadata, tensors, entries


def describe_gguf(checkpoint: Checkpoint) -> ModelMap:
    """The model map of a GGUF: tensors in the file's order, roles by their names in the known architectures."""
    metadata, where = checkpoint.metadata or {}, str(checkpoint.location)
    name = checkpoint.config["model_type"]
    known = [architecture for architecture in architectures() if architecture.gguf_name == name]
    if not known:
        names = sorted({architecture.gguf_name for architecture in architectures()})
        raise ConvertError(
            f"unknown architecture {name!r}", f"{where}: general.architecture", nearest(str(name), names)
        )
    block_count = metadata.get(Keys.LLM.BLOCK_COUNT.format(arch=name))
    if block_count is None:
        raise ConvertError(f"the file lacks the key {name}.block_count", where, "convert the original checkpoint")
    n_layers = block_count.value
    if type(n_layers) is not int or not 0 < n_layers <= len(checkpoint.tensors):
        raise ConvertError(
            f"{name}.block_count is {str(n_layers)[:60]}, and the file has {len(checkpoint.tensors)} tensors",
            where,
            "convert the original checkpoint",
        )
    roles = _roles(known)
    tensors = tuple(
        _describe_tensor(tensor_name, tensor, roles, where) for tensor_name, tensor in checkpoint.tensors.items()
    )
    kept = {key: value for key, value in metadata.items() if key not in _WRITERS_KEYS and not key.startswith("split.")}
    return ModelMap(name, n_layers, tensors, kept)


def _roles(known: list[Architecture]) -> dict[str, Role]:
    """Role by GGUF name, with {layer} in the place of the layer's index."""
    roles = dict.fromkeys((FREQUENCIES, LONG_FACTORS, SHORT_FACTORS), Role.ROPE)
    for architecture in known:
        names = gguf_name_map(architecture.gguf_name, n_layers=1)
        for rule in (*architecture.before, *architecture.layer, *architecture.after):
            name = gguf_name(names, rule.pattern.replace(".{expert}", "").format(layer=0))
            roles[name.replace("blk.0.", "blk.{layer}.")] = rule.role
    return roles


def _describe_tensor(name: str, tensor: StoredTensor, roles: dict[str, Role], where: str) -> TensorSpec:
    start, _, rest = name.partition(".")
    index, _, tail = rest.partition(".")
    layer = int(index) if start == "blk" and index.isdecimal() else None
    role = roles.get(name if layer is None else f"blk.{{layer}}.{tail}")
    if role is None:
        raise ConvertError(
            f"the tensor {name!r} is unknown to the architecture",
            where,
            "docs/add-an-architecture.md tells how to add it",
        )
    return TensorSpec(name, tensor.shape, role, layer, (name,))
