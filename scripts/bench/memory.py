"""Peak memory and throughput of a conversion of a llama of 7B shape: to a GGUF with an importance matrix given, or to a
safetensors directory with all that its profile wants of the calibration (128 samples of --sequence-length tokens).

The checkpoint is synthetic: random float16 weights, the same 64 MiB over and over (an encoder cannot tell), or, with
--sparse, a file of holes that takes no disk and holds zeros. The conversion runs in a process of its own, whose peak
resident memory is the operating system's figure. Shapes are those of a 7B llama, the vocabulary is SmolLM2's.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np

from bitwright.calibration.statistics.imatrix_file import save_imatrix
from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.converter.model.model_map import describe
from bitwright.converter.source.open import open_checkpoint
from bitwright.profiles.reading.schema import load_profile
from bitwright.profiles.sizes import size_text
from scripts.smollm2 import VOCABULARY, build

WIDTH, MLP_WIDTH, N_HEADS = 4096, 11008, 32
PATTERN_BYTES = 64 << 20


def config(n_layers: int) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "num_hidden_layers": n_layers,
        "hidden_size": WIDTH,
        "intermediate_size": MLP_WIDTH,
        "num_attention_heads": N_HEADS,
        "num_key_value_heads": N_HEADS,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }


def shapes(n_layers: int) -> dict[str, tuple[int, ...]]:
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for layer in range(n_layers):
        prefix = f"model.layers.{layer}."
        for kind in "qkvo":
            tensors[f"{prefix}self_attn.{kind}_proj.weight"] = (WIDTH, WIDTH)
        for kind in ("gate", "up"):
            tensors[f"{prefix}mlp.{kind}_proj.weight"] = (MLP_WIDTH, WIDTH)
        tensors[f"{prefix}mlp.down_proj.weight"] = (WIDTH, MLP_WIDTH)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = (WIDTH,)
    return tensors | {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}


def write_checkpoint(directory: Path, n_layers: int, sparse: bool, shard_bytes: int | None = None) -> None:
    """The configuration and one safetensors file, its data holes or the repeated pattern; with shard_bytes, bfloat16
    in files of about that many bytes and their index."""
    dtype = "F16" if shard_bytes is None else "BF16"
    (directory / "config.json").write_text(json.dumps(config(n_layers)))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes(n_layers).items():
        if shard_bytes is not None and sum(map(_n_bytes, shards[-1].values())) >= shard_bytes:
            shards.append({})
        shards[-1][name] = shape
    values = (np.random.default_rng(0).standard_t(5, PATTERN_BYTES // 2) * 0.02).astype(np.float32)
    pattern = (values.astype(np.float16) if dtype == "F16" else (values.view(np.uint32) >> 16).astype("<u2")).tobytes()
    if shard_bytes is None:
        _write_shard(directory / "model.safetensors", shards[0], dtype, None if sparse else pattern)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shard, name)
        _write_shard(directory / name, shard, dtype, None if sparse else pattern)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _n_bytes(shape: tuple[int, ...]) -> int:
    return 2 * int(np.prod(shape))


def _write_shard(path: Path, tensors: dict[str, tuple[int, ...]], dtype: str, pattern: bytes | None) -> None:
    header, offset = {}, 0
    for name, shape in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + _n_bytes(shape)]}
        offset += _n_bytes(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if pattern is None:
            file.truncate(8 + len(text) + offset)
        else:
            while offset:
                offset -= file.write(pattern[:offset])


def write_importance(directory: Path, path: Path) -> None:
    """A log-normal importance for every matrix of the layers."""
    random = np.random.default_rng(1)
    checkpoint = open_checkpoint(str(directory))
    matrices = [t for t in describe(checkpoint).tensors if t.layer is not None and len(t.shape) == 2]
    save_imatrix(
        path,
        ImportanceMatrix(
            sums={t.name: 512.0 * random.lognormal(0, 1, (1, t.n_columns)) for t in matrices},
            counts={t.name: np.array([512]) for t in matrices},
            corpus="log-normal",
            samples=1,
            sequence_length=512,
        ),
    )


@click.command(help=__doc__)
@click.option("--profile", default="balanced-4bit", show_default=True)
@click.option("--layers", default=32, show_default=True, help="Fewer make a smaller model of the same shapes.")
@click.option("--sparse", is_flag=True, help="Holes instead of random weights.")
@click.option("--effort", default="best", show_default=True)
@click.option("--sequence-length", default=16, show_default=True, help="Of the calibration of a directory.")
@click.option("--directory", default=".cache/bench-memory", type=click.Path(path_type=Path), show_default=True)
def main(profile: str, layers: int, sparse: bool, effort: str, sequence_length: int, directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    model = directory / "llama-7b-shape"
    tokenizer = build(Path(".cache/smollm2"))
    model.mkdir(parents=True)
    try:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tokenizer / name, model)
        write_checkpoint(model, layers, sparse)
        command = [
            sys.executable,
            "-m",
            "bitwright.converter",
            "--profile",
            profile,
            "--effort",
            effort,
            "--judge",
            "off",
        ]
        if load_profile(profile).target == "gguf":
            write_importance(model, directory / "imatrix.gguf")
            command += ["--imatrix", str(directory / "imatrix.gguf"), "--no-analysis"]
            command += ["--output", str(directory / "out.gguf")]
        else:
            command += [
                "--samples",
                "128",
                "--sequence-length",
                str(sequence_length),
                "--output",
                str(directory / "out"),
            ]
        command += ["--json", str(model)]
        start = time.monotonic()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        seconds = time.monotonic() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        report = json.loads(done.stdout)
        n_weights = sum(int(np.prod(shape)) for shape in shapes(layers).values())
        encode_seconds = report["seconds"]["encode"]
        print(f"source {size_text(report['source']['bytes'])}, artifact {size_text(report['artifact']['bytes'])}")
        share = peak / report["source"]["bytes"]
        print(f"peak resident memory {size_text(peak)}, {share:.2f} of the source, on {os.cpu_count()} cores")
        print(f"encode {encode_seconds:.0f} s, {n_weights / encode_seconds / 1e6:.1f} M weights/s")
        print(f"whole run {seconds:.0f} s: {report['seconds']}")
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
