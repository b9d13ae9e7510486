"""Measured speeds, each with what a step of it reads: measured.csv (whole runs), kernels.csv (sums of kernels)."""

import csv
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bitwright.profiles.advice.cache import AttentionLayer, Cache, cache_format
from bitwright.profiles.advice.efficiency import EXPERTS_OVERHEAD
from bitwright.profiles.advice.hardware import Device, find_device
from bitwright.profiles.advice.operators import Experts, Row, prompt_operations, step_operators
from bitwright.profiles.vocabulary import Role

DATA = Path(__file__).parent
_TEST = re.compile(r"(?P<kind>tg|pp)~?(?P<tokens>\d*)(@d(?P<depth>\d+))?((?P<of>[xu])b(?P<batch>\d+))?")
# Bits of the embedding and of the head: llama.cpp's mixes keep the head, and an embedding that is one, in Q6_K.
_OUTSIDE = {
    "Q4_K_M": (4.5, 6.5625),
    "Q4_0": (4.5, 6.5625),
    "IQ4_XS": (4.25, 6.5625),
    "IQ3_XXS": (3.4375, 5.5),
    "IQ2_XXS": (2.5625, 5.5),
    "Q8_0": (8.5, 8.5),
    "MXFP4": (8.5, 8.5),
}
_VLLM_AND_KIN = ("vLLM", "SGLang", "TRT-LLM", "AutoAWQ", "LMDeploy")


@dataclass(frozen=True)
class Point:
    """tokens_per_s: of all texts together. batch: texts, or tokens of one text (a test "ub"), in a step. n_bytes:
    that a step reads; least_bytes: the same if the texts have every expert in common; file_bytes: of the whole
    file; operations: of a prompt. group: whose constants are to predict it."""

    hardware: str
    model: str
    quant: str
    test: str
    kind: str
    group: str
    device: Device
    batch: int
    tokens: int
    layers: int
    has_experts: bool
    n_bytes: float
    least_bytes: float
    file_bytes: float
    operations: float
    tokens_per_s: float
    of_kernels: bool = False

    @property
    def ceiling(self) -> float:
        """Tokens a second when every byte that has to be read comes at the full bandwidth."""
        return self.batch * self.device.bandwidth / self.least_bytes

    @property
    def overheads(self) -> float:
        """How many times the overhead of a layer a step has."""
        return self.layers * (EXPERTS_OVERHEAD if self.has_experts else 1)

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.batch / self.tokens_per_s


@cache
def models() -> dict[str, dict[str, int]]:
    return tomllib.loads((DATA / "models.toml").read_text())


def rows_of(dims: dict[str, int], file_bytes: float, quant: str) -> list[Row]:
    """The model's tensors in a file of so many bytes. What the embedding and the head take is known, the rest is shared
    by the matrices of the layers as their weights are."""
    hidden, layers, vocab = dims["hidden"], dims["layers"], dims["vocab"]
    query, kv = dims["heads"] * dims["head"], dims["kv_heads"] * dims["head"]
    parts = [
        (Role.ATTENTION_QUERY, query * hidden),
        (Role.ATTENTION_KEY, kv * hidden),
        (Role.ATTENTION_VALUE, kv * hidden),
        (Role.ATTENTION_OUTPUT, query * hidden),
    ]
    if "experts" in dims:
        expert = dims["experts"] * dims["expert_mlp"] * hidden
        parts += [(role, expert) for role in (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)]
        parts += [(Role.ROUTER, dims["experts"] * hidden)]
    else:
        parts += [(role, dims["mlp"] * hidden) for role in (Role.MLP_GATE, Role.MLP_UP, Role.MLP_DOWN)]
    embedding_bits, head_bits = _OUTSIDE.get(quant, (16, 16))
    if dims.get("tied"):
        outside = [Row(Role.EMBEDDING, vocab * hidden, round(vocab * hidden * head_bits / 8), vocab)]
    else:
        outside = [
            Row(Role.EMBEDDING, vocab * hidden, round(vocab * hidden * embedding_bits / 8), vocab),
            Row(Role.OUTPUT, vocab * hidden, round(vocab * hidden * head_bits / 8), vocab),
        ]
    inside = file_bytes - sum(row.n_bytes for row in outside)
    total = sum(n_weights for _, n_weights in parts)
    return [
        Row(role, n_weights * layers, round(inside * n_weights / total), hidden * layers) for role, n_weights in parts
    ] + outside


def cache_of(dims: dict[str, int]) -> Cache:
    period, window = dims.get("period", 1), dims.get("window", 0)
    return Cache(
        tuple(
            AttentionLayer(
                dims["heads"], dims["kv_heads"], dims["head"], dims["head"], window if (layer + 1) % period else 0
            )
            for layer in range(dims["layers"])
        )
    )


def measured_points() -> list[Point]:
    """Whole runs."""
    with (DATA / "measured.csv").open(newline="") as file:
        return [_point(row) for row in csv.DictReader(file)]


def _point(row: dict[str, str]) -> Point:
    match = _TEST.fullmatch(row["test"])
    assert match is not None, row
    tokens, depth, batch = int(match["tokens"] or 128), int(match["depth"] or 0), int(match["batch"] or 1)
    dims, file_bytes = models()[row["model"]], float(row["file_gib"]) * 2**30
    rows, cache_ = rows_of(dims, file_bytes, row["quant"]), cache_of(dims)
    experts = Experts(dims.get("experts", 0), dims.get("used", 0))
    kv = cache_format("F16")
    operators = step_operators(rows, cache_, experts, kv, depth + tokens // 2, batch)
    # Tokens of one text, as of a draft that is checked, read its keys and values once.
    once = (batch - 1) * cache_.read(depth + tokens // 2, kv) if match["of"] == "u" else 0
    prompt = prompt_operations(rows, cache_, experts, depth + tokens)
    if depth:
        prompt -= prompt_operations(rows, cache_, experts, depth)
    return Point(
        hardware=row["hardware"],
        model=row["model"],
        quant=row["quant"],
        test=row["test"],
        kind=match["kind"],
        group=group_of(row["hardware"], row["backend"], row["quant"]),
        device=device_of(row["hardware"]),
        batch=batch,
        tokens=tokens,
        layers=dims["layers"],
        has_experts="experts" in dims,
        n_bytes=sum(operator.n_bytes for operator in operators) - once,
        least_bytes=sum(operator.least_bytes for operator in operators) - once,
        file_bytes=file_bytes,
        operations=prompt,
        tokens_per_s=float(row["tokens_per_s"]),
    )


def device_of(hardware: str) -> Device:
    return find_device(hardware.removesuffix(" CPU"))


def group_of(hardware: str, backend: str, quant: str) -> str:
    """By what it ran with."""
    memory = "hbm" if device_of(hardware).memory_kind == "hbm" else "gddr"
    if backend in _VLLM_AND_KIN:
        return f"vllm-{memory}-{quant.lower()}"
    return {"CUDA": f"cuda-{memory}", "Metal": "metal", "CPU": "cpu"}.get(backend, "rocm")


def kernel_points() -> list[Point]:
    """Llama-3.1-8B at 4096 tokens, a step as the sum of its kernels, each measured alone (kernels.csv, from the tables
    of aiconfigurator-core 0.12.0)."""
    points = []
    dims = models()["llama-3.1-8b"]
    with (DATA / "kernels.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            device = device_of(row["hardware"])
            memory = "hbm" if device.memory_kind == "hbm" else "gddr"
            n_bytes = float(row["floor_ms"]) / 1e3 * device.bandwidth
            points.append(
                Point(
                    hardware=row["hardware"],
                    model="llama-3.1-8b",
                    quant=row["format"],
                    test="tg@d4096",
                    kind="tg",
                    group=f"vllm-{memory}-{row['format'].lower()}",
                    device=device,
                    batch=1,
                    tokens=1,
                    layers=dims["layers"],
                    has_experts=False,
                    n_bytes=n_bytes,
                    least_bytes=n_bytes,
                    file_bytes=n_bytes,
                    operations=0,
                    tokens_per_s=1e3 / float(row["decode_ms"]),
                    of_kernels=True,
                )
            )
    return points


@dataclass(frozen=True)
class PromptSum:
    """The linear layers of a prompt of 8192 tokens, kernel by kernel. share: of the dense rate in 16 bits, of a sum in
    16 bits."""

    hardware: str
    format: str
    memory: str
    seconds: float
    share: float


def prompt_sums() -> list[PromptSum]:
    dims = models()["llama-3.1-8b"]
    rows = [row for row in rows_of(dims, 16e9, "F16") if row.role not in (Role.EMBEDDING, Role.OUTPUT)]
    operations = 2 * 8192 * sum(row.n_weights for row in rows)
    found = []
    with (DATA / "kernels.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            device, seconds = device_of(row["hardware"]), float(row["prefill_8192_ms"]) / 1e3
            memory = "hbm" if device.memory_kind == "hbm" else "gddr"
            share = operations / seconds / device.rates["fp16"]
            found.append(PromptSum(row["hardware"], row["format"], memory, seconds, share))
    return found
