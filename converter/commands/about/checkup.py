"""What a run finds on this machine, as plain data by topic."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bitwright import formats
from bitwright.converter.boundary.machine import instruction_sets, usable_cores
from bitwright.converter.job.identity import tool_identity
from bitwright.profiles.sizes import size_text

_PACKAGES = ("numba", "numpy", "gguf", "torch", "transformers", "huggingface_hub", "datasets")
_RUNTIMES = {
    "llama.cpp": "xllamacpp",
    "vLLM": "vllm",
    "compressed-tensors": "compressed-tensors",
    "lm-evaluation-harness": "lm-eval",
}
FORMATS_FOLDER = Path(str(formats.__file__)).parent


def checkup() -> dict[str, dict[str, Any]]:
    """Every topic with its facts. None stands for what is not there; no secret is among them."""
    return {
        "versions": {
            "bitwright": tool_identity(),
            "python": platform.python_version(),
            "system": platform.platform(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "processor": _processor(),
        "caches": _caches(),
        "runtimes": {name: _version(package) for name, package in _RUNTIMES.items()},
        "GPUs": _gpus(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> dict[str, Any]:
    import psutil
    from llvmlite import binding

    memory = psutil.virtual_memory()
    return {
        "name": binding.get_host_cpu_name(),
        "usable cores": usable_cores(),
        "instructions": list(instruction_sets()),
        "memory": f"{size_text(memory.total)}, {size_text(memory.available)} of it free",
    }


def _caches() -> dict[str, Any]:
    from huggingface_hub import constants, get_token

    kernels = [path for path in FORMATS_FOLDER.rglob("*.nbi")]
    return {
        "models of the Hub": constants.HF_HUB_CACHE if Path(constants.HF_HUB_CACHE).is_dir() else None,
        "logged in at the Hub": get_token() is not None,
        "kernels": f"{len(kernels)} compiled" if kernels else "compiled when they are first used, about a minute",
        "numba's own place": os.environ.get("NUMBA_CACHE_DIR"),
    }


def _gpus() -> dict[str, Any]:
    if find_spec("torch") is None:
        return {}
    import torch

    cuda = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    gpus = [(torch.cuda.get_device_name(i), torch.cuda.get_device_properties(i).total_memory) for i in cuda]
    found = {f"cuda:{i}": f"{name}, {size_text(n_bytes)}" for i, (name, n_bytes) in enumerate(gpus)}
    return found | {"mps": torch.backends.mps.is_available()}
