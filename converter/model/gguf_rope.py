"""The rotary embedding that a GGUF states, as a configuration of transformers states it.

transformers' own reader of GGUFs leaves scalings out. A GGUF holds llama3's scaling as a divisor for each frequency
only: the parameters that give exactly these are found again.
"""

from typing import Any

import numpy as np

from bitwright.converter.model.rope import FREQUENCIES, LONG_FACTORS, SHORT_FACTORS, attention_factor, llama3_factors
from bitwright.converter.source.checkpoint import Checkpoint

# Of every model with llama3's scaling so far; the context that it was trained with is a power of two.
_LOW, _HIGH = 1.0, 4.0
_ORIGINALS = tuple(2**n for n in range(6, 21))


def rope_table(checkpoint: Checkpoint, rotary: int) -> dict[str, Any]:
    """The entries of `rope_parameters` that the GGUF's keys and tensors stand for, {} for no scaling that is known.
    rotary: columns of a head that are turned."""
    metadata = checkpoint.metadata or {}
    prefix = f"{checkpoint.config['model_type']}.rope."

    def stated(key: str) -> Any:
        return metadata[prefix + key].value if prefix + key in metadata else None

    theta, original = stated("freq_base"), stated("scaling.original_context_length")
    if FREQUENCIES in checkpoint.tensors and theta is not None:
        return _llama3(checkpoint.read(FREQUENCIES), theta, rotary)
    if LONG_FACTORS in checkpoint.tensors and SHORT_FACTORS in checkpoint.tensors:
        factors = {"long_factor": LONG_FACTORS, "short_factor": SHORT_FACTORS}
        lists = {key: checkpoint.read(name).tolist() for key, name in factors.items()}
        extra = stated("scaling.attn_factor")
        longrope: dict[str, Any] = {"rope_type": "longrope", **lists, "original_max_position_embeddings": original}
        return longrope | ({} if extra is None else {"attention_factor": extra})
    kind, factor = stated("scaling.type"), stated("scaling.factor")
    if kind not in ("linear", "yarn") or factor is None:
        return {}
    table: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        table["original_max_position_embeddings"] = original
        if (extra := stated("scaling.attn_factor")) is not None:  # of what llama.cpp applies by itself
            table["attention_factor"] = extra * attention_factor(table)
    return table


def _llama3(divisors: np.ndarray, theta: float, rotary: int) -> dict[str, Any]:
    for original in _ORIGINALS:
        table: dict[str, Any] = {
            "rope_type": "llama3",
            "factor": float(divisors.max()),
            "low_freq_factor": _LOW,
            "high_freq_factor": _HIGH,
            "original_max_position_embeddings": original,
        }
        if np.allclose(llama3_factors(table | {"rope_theta": theta}, rotary), divisors, rtol=1e-5):
            return table
    return {}
