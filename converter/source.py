"""The stage `source`: from MODEL to a Checkpoint."""

import re
from pathlib import Path

from converter import gguf_source, hub, safetensors_source
from converter.checkpoint import Checkpoint
from formats.errors import ConvertError
from formats.names import is_text, printable

# A snapshot in the Hub's cache.
_SNAPSHOT = re.compile(r"/models--(?P<organization>[^/]+)--(?P<name>[^/]+)/snapshots/(?P<commit>[^/]+)$")


def open_checkpoint(model: str, *, metadata_only: bool = False, token: str | None = None) -> Checkpoint:
    """MODEL, a local Hugging Face directory, a GGUF file, or a Hub id[@revision], as a Checkpoint.

    metadata_only: of a Hub model fetch the small files and the headers of the weights only; `with_weights()` of the
    result brings the weights. Local models are the same either way.
    Raises ConvertError for anything that is no complete, unquantized safetensors or GGUF model.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return safetensors_source.open_directory(path, *_identity(path.resolve()))
    if path.is_file():
        return gguf_source.open_gguf(path)
    if hub.is_hub_id(model):
        return hub.open_hub(model, metadata_only=metadata_only, token=token)
    raise ConvertError(
        f"no such directory or file: {model}", model, "give a local checkpoint, a GGUF file, or a Hub id like org/name"
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
