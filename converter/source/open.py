"""The stage `source`: from MODEL to a Checkpoint."""

import re
from dataclasses import replace
from pathlib import Path

from bitwright.converter.source import gguf as gguf_source
from bitwright.converter.source import hub
from bitwright.converter.source import safetensors as safetensors_source
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.converter.source.lora.adapter import Adapter, is_adapter, open_adapter
from bitwright.formats.errors import ConvertError
from bitwright.formats.names import is_text, printable

# A snapshot in the Hub's cache.
_SNAPSHOT = re.compile(r"/models--(?P<organization>[^/]+)--(?P<name>[^/]+)/snapshots/(?P<commit>[^/]+)$")


def open_checkpoint(
    model: str,
    *,
    metadata_only: bool = False,
    token: str | None = None,
    from_quantized: bool = False,
    base: str | None = None,
) -> Checkpoint:
    """MODEL, a local Hugging Face directory, a GGUF file, or a Hub id[@revision], as a Checkpoint.

    metadata_only: of a Hub model fetch the small files and the headers of the weights only; `with_weights()` of the
    result brings the weights. Local models are the same either way.
    from_quantized: quantized tensors of a GGUF are decoded, which else are refused. base: of an adapter, into which it
    is merged; None for the one that the adapter states.
    Raises ConvertError for anything that is no complete safetensors or GGUF model, nor an adapter of one.
    """
    path = Path(model).expanduser()
    if path.is_dir() and is_adapter(path):
        return _merged(path, _identity(path.resolve())[0], base, metadata_only, token)
    if path.is_dir():
        checkpoint = safetensors_source.open_directory(path, *_identity(path.resolve()))
    elif path.is_file():
        checkpoint = gguf_source.open_gguf(path, from_quantized)
    elif hub.is_hub_id(model):
        try:
            checkpoint = hub.open_hub(model, metadata_only=metadata_only, token=token)
        except hub.AdapterOnHub as found:
            return _merged(found.directory, model.partition("@")[0], base, metadata_only, token)
    else:
        raise ConvertError(
            f"no such directory or file: {model}",
            model,
            "give a local checkpoint, a GGUF file, or a Hub id like org/name",
        )
    if base is not None:
        raise ConvertError(
            "--base names what an adapter is merged into, and MODEL is no adapter", model, "leave out --base"
        )
    return checkpoint


def open_by_content(model: str, *, from_quantized: bool = False, base: str | None = None) -> Checkpoint:
    """The same, with files that are told apart by their content alone: copies on several machines are one model."""
    return replace(open_checkpoint(model, from_quantized=from_quantized, base=base), by_content=True)


def open_adapter_of(
    model: str, base: str | None = None, *, metadata_only: bool = False, token: str | None = None
) -> tuple[Adapter, Checkpoint]:
    """An adapter, a local directory or a Hub id, and its base model, not merged. Raises ConvertError for MODEL that is
    no adapter."""
    directory = Path(model).expanduser()
    if not directory.is_dir() and hub.is_hub_id(model):
        try:
            hub.open_hub(model, metadata_only=True, token=token)
        except hub.AdapterOnHub as found:
            directory = found.directory
    if not directory.is_dir() or not is_adapter(directory):
        raise ConvertError("MODEL is no adapter (LoRA)", model, "name a directory or a repository with an adapter")
    return _with_base(directory, base, metadata_only, token)


def _merged(directory: Path, model_id: str, base: str | None, metadata_only: bool, token: str | None) -> Checkpoint:
    """The base model with the adapter of this directory in it."""
    adapter, checkpoint = _with_base(directory, base, metadata_only, token)
    return adapter.merged(checkpoint, model_id)


def _with_base(directory: Path, base: str | None, metadata_only: bool, token: str | None) -> tuple[Adapter, Checkpoint]:
    adapter = open_adapter(directory)
    name = base or adapter.base_name
    if name is None:
        raise _without_base("does not say of which model", directory)
    path = Path(name).expanduser()
    if base is None and not hub.is_hub_id(name) and not path.exists():
        raise _without_base(f"is one of {name!r}, which is not on this machine", directory)
    if path.is_dir() and is_adapter(path):
        raise ConvertError("the base is an adapter, too", name, "merge that one into its base first")
    return adapter, open_checkpoint(name, metadata_only=metadata_only, token=token)


def _without_base(what: str, directory: Path) -> ConvertError:
    return ConvertError(
        f"this is an adapter (LoRA), and {what}",
        str(directory),
        "name the model that it was trained from: --base org/name, or a directory",
    )


def _identity(directory: Path) -> tuple[str, str | None]:
    """Model id and revision: a snapshot in the Hub's cache is what the Hub calls it, any other directory its name."""
    if not is_text(directory.name):
        raise ConvertError(
            "the name of the model's directory, which the artifact gives as the model's, is no UTF-8",
            printable(str(directory)),
            "rename it",
        )
    snapshot = _SNAPSHOT.search(directory.as_posix())
    if snapshot is None:
        return directory.name or "model", None
    return f"{snapshot['organization']}/{snapshot['name']}", snapshot["commit"]
