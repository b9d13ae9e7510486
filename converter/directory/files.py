"""The stage `write` of a safetensors directory: it appears complete, or not at all.

It grows beside its final name, shard by shard and module by module as artifact/writer.py does it; configuration,
tokenizer and recipe follow, and once it is verified a rename completes it.
"""

import json
import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bitwright.converter.artifact.directory_record import RECIPE_NAME, listed_files, read_recipe
from bitwright.converter.artifact.layout import partial_path
from bitwright.converter.artifact.ownership import (
    Replaceable,
    check_free,
    foreign_entries,
    put_in_place,
    remove_replaced,
)
from bitwright.converter.artifact.run import Run
from bitwright.converter.artifact.writer import (
    JOURNAL,
    ArtifactWriter,
    PlanEncoder,
    begins_as,
    changed_meanwhile,
    continues,
    written_sha256,
)
from bitwright.converter.directory.layout import SafetensorsLayout, index_json
from bitwright.converter.job.work_directory import REPLACEABLE
from bitwright.converter.source.checkpoint import (
    LICENSE_PATTERNS,
    POOLING_PATTERNS,
    SENTENCEPIECE_NAMES,
    TEMPLATES,
    Checkpoint,
    model_files,
    model_folders,
)
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import file_sha256, make_directory, remove, remove_tree, sync_directory
from bitwright.formats.files.journal import read_lines
from bitwright.formats.files.regular_file import read_json
from bitwright.formats.files.safetensors import INDEX_NAME, SINGLE_NAME
from bitwright.formats.files.whole import copy_file, is_temporary, whole_file
from bitwright.profiles.planning.plan_modules import PlannedModule

CONFIG_NAME = "config.json"
# Spellings of the same key, by versions of transformers.
_DTYPE_KEYS = ("dtype", "torch_dtype")
# What a runtime or a user needs of the source beside config.json, which is made anew.
_COPIED = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", *SENTENCEPIECE_NAMES),
    *("chat_template.jinja", "chat_template.json", f"{TEMPLATES}/*.jinja"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *POOLING_PATTERNS,
    *LICENSE_PATTERNS,
)


def companions(location: Path) -> list[Path]:
    """The files of a source directory that go into an artifact as they are, in order.

    Raises ConvertError for a link to a file outside of the model: the artifact may be published.
    """
    return model_files(location, _COPIED)


def write_directory(
    run: Run,
    encoder: PlanEncoder[PlannedModule],
    layouts: Sequence[SafetensorsLayout],
    stated: dict[str, Any],
    recipe: dict[str, Any],
) -> list[Path]:
    """Write what is not there yet and return all files, those with the weights first: of the partial directory, or of
    the output where an earlier call has completed it.

    stated: what config.json says otherwise than the source's. recipe: what RECIPE_NAME says beside the files' hashes.
    Raises as ArtifactWriter does, and ConvertError for another directory in the place of ours; a later call continues.
    """
    output, journal, partial = run.output, run.work_dir / JOURNAL, partial_path(run.output)
    replaceable = Replaceable(run.work_dir / REPLACEABLE)
    entries = {entry.name for layout in layouts for entry in layout.tensors}
    recorded = {line["tensor"]: line["sha256"] for line in read_lines(journal)}
    if output.exists() and recorded.keys() >= entries and not partial.exists() and _is_whole(output, recipe):
        remove_replaced(output, replaceable)
        return finished_files(output)  # a run that was killed after the rename
    check_free([output], replaceable, directory=True)
    names = [(layout, partial / layout.file_name) for layout in layouts]
    weights = [(path, layout) for layout, name in names for path in (name, partial_path(name)) if path.exists()]
    if not any(continues(path, layout, recorded) for path, layout in weights):
        replaceable.check_growing(partial, bool(weights) and all(begins_as(path, layout) for path, layout in weights))
    if not journal.exists():
        remove_tree(partial)  # of a job that was given up
    make_directory(partial, "choose another --output")
    replaceable.grows(partial)
    for path in filter(is_temporary, partial.iterdir()):
        remove(path)
    ArtifactWriter(encoder, layouts, partial, journal).write(run.progress, run.should_stop)
    try:
        _write_companions(partial, layouts, run.checkpoint, stated, recipe)
    except OSError as error:
        raise _writing_failed(error, output) from None
    return directory_files(partial)


def complete_directory(run: Run) -> list[Path]:
    """Give what write_directory has written its name, where it has not got it yet, and return all files."""
    output, partial = run.output, partial_path(run.output)
    try:
        if partial.exists():
            for path in directory_files(partial):
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            for folder in (*model_folders(partial), partial):
                sync_directory(folder)
            put_in_place(partial, output, Replaceable(run.work_dir / REPLACEABLE))
            sync_directory(output.parent)
    except OSError as error:
        raise _writing_failed(error, output) from None
    return finished_files(output)


def _writing_failed(error: OSError, output: Path) -> ConvertError:
    remedy = "make room, then run the same command again"
    return ConvertError(f"writing failed: {error}", str(error.filename or output), remedy)


def directory_files(directory: Path) -> list[Path]:
    """All files, those with weights first, each kind by name, those in folders last; not what a kill has left while it
    was written."""
    paths = sorted(path for path in directory.iterdir() if path.is_file() and not is_temporary(path))
    inside = (path for folder in model_folders(directory) for path in folder.iterdir())
    paths += sorted(path for path in inside if path.is_file() and not is_temporary(path))
    return [*(p for p in paths if p.suffix == ".safetensors"), *(p for p in paths if p.suffix != ".safetensors")]


def finished_files(output: Path) -> list[Path]:
    """The same of a directory that has its recipe, without what others have put there."""
    foreign = foreign_entries(output)
    return [path for path in directory_files(output) if path.relative_to(output).as_posix() not in foreign]


def is_written_name(name: str) -> bool:
    """Whether a directory of this tool may have a file of this path."""
    own = (CONFIG_NAME, INDEX_NAME, RECIPE_NAME, SINGLE_NAME, "model-?????-of-?????.safetensors", *_COPIED)
    # A * of a pattern stands for no part of a path.
    return any(name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in own)


def _write_companions(
    directory: Path,
    layouts: Sequence[SafetensorsLayout],
    checkpoint: Checkpoint,
    stated: dict[str, Any],
    recipe: dict[str, Any],
) -> None:
    for source in companions(checkpoint.location):
        target = directory / source.relative_to(checkpoint.location)
        make_directory(target.parent)
        copy_file(source, target)
    if (index := index_json(layouts)) is not None:
        with whole_file(directory / INDEX_NAME, "index of shards") as file:
            file.write(index)
    _write_json(directory / CONFIG_NAME, stated_config(checkpoint, stated))
    files = [
        {"path": path.relative_to(directory).as_posix(), "bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in directory_files(directory)
        if path.name != RECIPE_NAME
    ]
    _write_json(directory / RECIPE_NAME, {**recipe, "files": files})


def stated_config(checkpoint: Checkpoint, stated: dict[str, Any]) -> dict[str, Any]:
    """The source's config.json as it is right for the directory: with these values, its dtype under either of its names
    and wherever it is said of the text, quantized in this way alone, and with a head of its own where one is stored,
    which vLLM reads from a model only that is not tied."""
    config = read_json(checkpoint.location / CONFIG_NAME)
    has_head = any(name.endswith("lm_head.weight") for name in checkpoint.tensors)
    if isinstance(text := config.get("text_config"), dict):
        text = {key: stated["dtype"] if key in _DTYPE_KEYS else value for key, value in text.items()}
        text.pop("quantization_config", None)
        config["text_config"] = _untied(text, has_head)
    if "torch_dtype" in config:
        config["torch_dtype"] = stated["dtype"]
    return {**_untied(config, has_head), **stated}


def _untied(config: dict[str, Any], has_head: bool) -> dict[str, Any]:
    return {**config, "tie_word_embeddings": False} if has_head else dict(config)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with whole_file(path, path.name) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def written_hashes(run: Run, layouts: Sequence[SafetensorsLayout], recipe: dict[str, Any]) -> dict[Path, str]:
    """SHA-256 of every file of the finished directory. Raises ConvertError for a directory that is not what this job
    has written: weights by its journal, everything else by the recipe that it holds, which has to be this job's."""
    output, journal = run.output, run.work_dir / JOURNAL
    paths = {output / layout.file_name: layout for layout in layouts}
    hashes = {path: written_sha256(path, layout, journal) for path, layout in paths.items()}
    if not _is_whole(output, recipe):
        raise changed_meanwhile(output)
    return {path: hashes.get(path) or file_sha256(path) for path in finished_files(output)}


def _is_whole(output: Path, recipe: dict[str, Any]) -> bool:
    """Whether the directory is what this job wrote, and every file as it was."""
    if not (output / RECIPE_NAME).is_file():
        return False
    stored = read_recipe(output)
    files = listed_files(stored)
    stored.pop("files", None)
    if not files or stored != json.loads(json.dumps(recipe)):
        return False
    return all((output / path).is_file() and file_sha256(output / path) == sha256 for path, sha256 in files.items())
