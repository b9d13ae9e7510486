"""Commands that run an artifact: the file or directory that lies here, or the one of a repository on the Hub."""

import shlex
from collections.abc import Collection
from pathlib import Path

from bitwright.converter.artifact.naming import unique_tag
from bitwright.converter.report.data import Artifact


def local_lines(artifact: Artifact, location: Path) -> list[str]:
    """Commands for what a conversion has just written. location: the directory, or the first file of a GGUF."""
    path = shlex.quote(str(location))
    if artifact.is_directory:
        return [f"vllm serve {path}"]
    lines = [f"llama-server -m {path}"]
    if len(artifact.files) == 1:  # the two others import one file
        name = shlex.quote(location.stem.lower())
        lines += [f"echo FROM {path} > Modelfile && ollama create {name}", f"lms import {path}"]
    return lines


def hub_lines(repository: str, artifact: Artifact, all_files: Collection[str]) -> list[str]:
    """Commands for an artifact in a repository. all_files: the paths of every file there, by which it is clear whether
    the artifact's label finds it and nothing else; where it does not, its file is named."""
    if artifact.is_directory:
        return [f"vllm serve {shlex.quote(repository)}"]
    first = artifact.first.path
    tag = unique_tag(first, all_files)
    if tag is None:
        return [
            f"llama-server -hf {shlex.quote(repository)} --hf-file {shlex.quote(first)}",
            f"ollama run {shlex.quote(f'hf.co/{repository}:{first}')}",
        ]
    return [
        f"llama-server -hf {shlex.quote(f'{repository}:{tag}')}",
        f"ollama run {shlex.quote(f'hf.co/{repository}:{tag}')}",
        f"lms get {shlex.quote(f'https://huggingface.co/{repository}@{tag}')}",
    ]
