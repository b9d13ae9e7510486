"""The command `convert verify`: any artifact against its source."""

from pathlib import Path

from converter.directory_artifact import DirectoryArtifact
from converter.directory_verify import verify_directory
from converter.model_map import describe
from converter.progress import Progress
from converter.source import open_checkpoint
from converter.verify import TensorError, artifact_files, as_stored, verify


def verify_artifact(artifact: Path, model: str, progress: Progress) -> list[TensorError]:
    """The error of every tensor of a GGUF, decoded by the gguf package, or of a directory. Raises ConvertError for an
    artifact of another model, and as the stage `verify` does."""
    checkpoint = open_checkpoint(model)
    model_map = describe(checkpoint)
    if artifact.is_dir():
        directory = DirectoryArtifact.of_recipe(artifact)
        directory.check_model(model_map)
        return verify_directory(artifact, directory, checkpoint, None, {}, progress)
    files = artifact_files(artifact)
    return verify(files, checkpoint, as_stored(model_map, files), None, progress)
