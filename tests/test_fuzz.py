"""Every reader, given damaged files: it reads them or raises ConvertError, and takes no more memory than they allow.

Mutations are drawn from a seed, so that a failure comes back. Bytes are changed, inserted, cut out and cut off; in JSON
also values and keys, by what a hostile or careless writer would put there.
"""

import json
import random
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, Keys
from gguf.constants import GGUFValueType
from gguf.gguf_writer import GGUFValue

from bitwright.calibration.sensitivity.table import save_sensitivity
from bitwright.calibration.statistics.activation_file import save_activations
from bitwright.calibration.statistics.activations import ActivationStatistics, CachedPeaks, MatrixInputs
from bitwright.calibration.statistics.histogram import N_BINS, N_MAGNITUDES
from bitwright.calibration.statistics.imatrix_file import load_imatrix, save_imatrix
from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.calibration.text.chat_template import rendered
from bitwright.converter.artifact.directory_record import RECIPE_NAME
from bitwright.converter.directory.artifact import DirectoryArtifact
from bitwright.converter.gguf.verify import artifact_files, artifact_tensors
from bitwright.converter.model.gguf_map import describe_gguf
from bitwright.converter.model.model_map import describe
from bitwright.converter.report.inspect import inspect_file, inspect_text
from bitwright.converter.smoothing.record import Smoothing, save_smoothing
from bitwright.converter.smoothing.search import SmoothedGroup
from bitwright.converter.source.gguf import open_gguf, open_parts
from bitwright.converter.source.open import open_checkpoint
from bitwright.converter.source.smoothed import Folding
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.gguf import TensorEntry, lay_out
from bitwright.formats.files.journal import append_line, read_lines
from bitwright.formats.files.safetensors import header, read_header
from bitwright.formats.files.stored_tensor import NUMPY_DTYPES
from bitwright.formats.schemes.registry import get_scheme
from bitwright.profiles.reading.schema import load_profile, parse_profile
from tests.calibration.sensitivity.test_table import table

ODD_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**33, 2**63, 2**64, -(2**63), 10**12, 10**400, 0.5, 1e308, -0.0),
    *(float("nan"), float("inf"), "", "x", "\0", "../../etc/passwd", "\ud800", "x" * 5000),
    *([], {}, [[]], [None], [{}], {"": None}, {"type": None}, {"type": "BPE"}, [0] * 5000, [["a", "b"]], ["a b"]),
]
ODD_BYTES = [b"\0" * 8, b"\xff" * 8, b"\xff" * 4, b"\0\0\0\x80", b"{", b"[" * 3000, b'"', b"\n", b"1e999", b"\xc3("]
# Beside what a file's own size accounts for: JSON and Python's objects take many times the bytes of their text.
MEMORY_PER_BYTE, MEMORY = 100, 6 << 20


def damaged_bytes(sound: bytes, draw: random.Random) -> bytes:
    content = bytearray(sound)
    for _ in range(draw.choice([1, 1, 2, 4])):
        # Where lengths, counts and types are: mostly the beginning.
        reach = min(len(content), draw.choice([32, 400, len(content)]))
        start = draw.randrange(reach) if reach else 0
        stop = start + draw.choice([1, 1, 4, 8, 64])
        kind = draw.randrange(6)
        if kind == 0 and content:
            content[start] ^= 1 << draw.randrange(8)
        elif kind == 1:
            content[start : start + 8] = draw.choice(ODD_BYTES)
        elif kind == 2:
            content[start:stop] = draw.randbytes(stop - start)
        elif kind == 3:
            del content[start:stop]
        elif kind == 4:
            content[start:start] = content[start:stop] * draw.choice([1, 20])
        else:
            del content[draw.randrange(len(content) + 1) :]
    return bytes(content)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key or index) in parsed JSON."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def damaged_json(value: Any, draw: random.Random) -> Any:
    value = json.loads(json.dumps(value))
    for _ in range(draw.choice([1, 1, 2])):
        found = list(places(value))
        if not found or draw.random() < 0.02:
            return odd_value(draw)
        container, key = draw.choice(found)
        kind = draw.randrange(5)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[draw.choice([*container, "x"])] = container.pop(key)
        elif kind == 2 and isinstance(container[key], int | float):
            container[key] = draw.choice(
                [-container[key], container[key] * 2**40, str(container[key]), [container[key]]]
            )
        else:
            container[key] = odd_value(draw)
    return value


def odd_value(draw: random.Random) -> Any:
    return deepcopy(draw.choice(ODD_VALUES))  # what is put in one place must not be changed in another


def as_json(sound: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.3:
        return damaged_bytes(sound, draw)
    return json.dumps(damaged_json(json.loads(sound), draw)).encode()


def as_safetensors(sound: bytes, draw: random.Random) -> bytes:
    """The header's JSON, or a description in its metadata, written anew with its right length."""
    if draw.random() < 0.4:
        return damaged_bytes(sound, draw)
    length = int.from_bytes(sound[:8], "little")
    described = json.loads(sound[8 : 8 + length])
    metadata = described.get("__metadata__", {})
    key = next((key for key in metadata if key.startswith("bitwright.")), None)
    if key is not None and draw.random() < 0.6:
        metadata[key] = json.dumps(damaged_json(json.loads(metadata[key]), draw))
    else:
        described = damaged_json(described, draw)
    text = json.dumps(described).encode()
    return len(text).to_bytes(8, "little") + text + sound[8 + length :]


def fuzz(
    path: Path,
    read: Callable[[Path], Any],
    rounds: int,
    damage: Callable[[bytes, random.Random], bytes] = damaged_bytes,
) -> None:
    """The sound file is read; so are some damaged ones, or the test tells nothing; and nothing else happens."""
    sound = path.read_bytes()
    read(path)
    draw = random.Random(7)
    refused = 0
    tracemalloc.start()
    try:
        for i in range(rounds):
            content = damage(sound, draw)
            path.write_bytes(content)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                read(path)
            except ConvertError as error:
                refused += 1
                assert error.what and error.where and error.remedy
            except BaseException as error:
                error.add_note(f"round {i} of {path.name}: {content[:300]!r}")
                raise
            taken = tracemalloc.get_traced_memory()[1] - before
            assert taken < MEMORY + MEMORY_PER_BYTE * len(content), (i, taken, content[:300])
    finally:
        tracemalloc.stop()
        path.write_bytes(sound)
    assert rounds // 20 < refused


def inspected(path: Path) -> None:
    inspect_text(inspect_file(path))


def gguf(path: Path, metadata: dict[str, GGUFValue], tensors: dict[str, np.ndarray]) -> Path:
    entries = [TensorEntry(name, a.shape, GGMLQuantizationType.F32, a.nbytes) for name, a in tensors.items()]
    (layout,) = lay_out(path.name, metadata, entries)
    content = bytearray(layout.header)
    for array, offset in zip(tensors.values(), layout.offsets, strict=True):
        content.extend(bytes(offset - len(content)) + array.tobytes())
    path.write_bytes(bytes(content) + bytes(layout.n_bytes - len(content)))
    return path


def text(value: str) -> GGUFValue:
    return GGUFValue(value, GGUFValueType.STRING)


def test_safetensors_headers(tmp_path):
    shapes = {f"layer.{i}": (dtype, (2, i)) for i, dtype in enumerate(NUMPY_DTYPES)}
    n_bytes = sum(2 * i * NUMPY_DTYPES[dtype].itemsize for i, dtype in enumerate(NUMPY_DTYPES))
    path = tmp_path / "model.safetensors"
    path.write_bytes(header(shapes) + bytes(n_bytes))

    def read(path: Path) -> None:
        for name, tensor in read_header(path)[0].items():
            tensor.read(name)

    fuzz(path, read, 800, as_safetensors)


SIZES = {
    **{"block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 32, "vocab_size": 2},
    **{"attention.head_count": 2, "attention.head_count_kv": 2, "attention.key_length": 16},
    **{"attention.value_length": 16, "rope.dimension_count": 16},
}


def test_gguf(tmp_path):
    """A source, an artifact in one piece, and what inspect shows of it."""
    metadata = {
        Keys.General.ARCHITECTURE: text("llama"),
        **{f"llama.{key}": GGUFValue(n, GGUFValueType.UINT32) for key, n in SIZES.items()},
        "llama.attention.layer_norm_rms_epsilon": GGUFValue(1e-5, GGUFValueType.FLOAT32),
        "split.count": GGUFValue(1, GGUFValueType.UINT16),
        "tokenizer.ggml.tokens": GGUFValue(["a", "ü"], GGUFValueType.ARRAY, GGUFValueType.STRING),
        "tokenizer.ggml.scores": GGUFValue([0.5, 1.5], GGUFValueType.ARRAY, GGUFValueType.FLOAT32),
        "bitwright.super_weights.rescaled": text("{}"),
    }
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    names = ["token_embd", "output_norm", "blk.0.attn_norm", "blk.0.ffn_norm", *(f"blk.0.{name}" for name in matrices)]
    shapes = {name: (32,) if "norm" in name else (2, 32) if name == "token_embd" else (32, 32) for name in names}
    tensors = {f"{name}.weight": np.ones(shape, np.float32) for name, shape in shapes.items()}

    def read(path: Path) -> None:
        checkpoint = open_gguf(path)
        describe_gguf(checkpoint)
        for name in checkpoint.tensors:
            checkpoint.read(name)

    def decode(path: Path) -> None:
        for tensor in artifact_tensors(artifact_files(path)).values():
            tensor.decode(0, tensor.n_rows)
        inspected(path)

    path = gguf(tmp_path / "m.gguf", metadata, tensors)
    fuzz(path, read, 500)
    fuzz(path, decode, 500)
    del metadata["split.count"]
    fuzz(gguf(path, metadata, tensors), open_parts, 200)


@pytest.mark.parametrize("name", ["imatrix.gguf", "importance.dat"])
def test_importance_matrices(tmp_path, name):
    sums = {"blk.0.ffn_up.weight": np.ones((2, 32)), "blk.0.attn_q.weight": np.full((1, 8), 2.0)}
    counts = {key: np.full(len(values), 5) for key, values in sums.items()}
    matrix = ImportanceMatrix(sums, counts, model="org/model", corpus="text", samples=5, sequence_length=4)
    save_imatrix(tmp_path / name, matrix)

    def read(path: Path) -> None:
        found = load_imatrix(path)
        for weight in found.names:
            found.columns(weight)
        inspected(path)

    fuzz(tmp_path / name, read, 500)


def test_sensitivity_tables(tmp_path):
    save_sensitivity(tmp_path / "table.safetensors", table())
    fuzz(tmp_path / "table.safetensors", inspected, 500, as_safetensors)


def test_activation_statistics(tmp_path):
    shapes = {"minima": 4, "maxima": 4, "squares": 4, "values": N_BINS, "peaks": N_MAGNITUDES + 1, "ranges": 2}
    kinds = {"minima": np.float32, "maxima": np.float32, "values": np.int64, "peaks": np.int64, "counts": np.int64}
    arrays = {
        field.name: np.ones((2, shapes[field.name]) if field.name in shapes else 2, kinds.get(field.name, np.float64))
        for field in fields(MatrixInputs)
    }
    inputs = {"blk.0.ffn_up.weight": MatrixInputs(**arrays)}
    caches = {0: CachedPeaks(keys=np.ones((2, 8), np.float32), values=np.ones((2, 8), np.float32))}
    statistics = ActivationStatistics(inputs, "org/model", None, "text", "ab" * 32, 5, 4, caches=caches)
    save_activations(tmp_path / "activations.safetensors", statistics)
    fuzz(tmp_path / "activations.safetensors", inspected, 400, as_safetensors)


def test_records_of_smoothing(tmp_path):
    group = SmoothedGroup("attention", 0, 0.5, 0.1, 0.05, 9.0, 3.0, 0.5, 2.0, {"0.5": 0.05})
    folding = Folding(rows=np.ones(4, np.float32))
    smoothing = Smoothing("m", None, 0.5, (group,), {"blk.0.attn_q.weight": np.ones((1, 4))}, {"q": folding})
    save_smoothing(tmp_path / "smoothing.safetensors", smoothing)
    fuzz(tmp_path / "smoothing.safetensors", inspected, 500, as_safetensors)


def test_journals(tmp_path):
    for i in range(5):
        append_line(tmp_path / "journal.jsonl", {"tensor": f"blk.{i}", "sha256": "ab" * 32, "rows": [i, 2]})
    path = tmp_path / "journal.jsonl"
    sound = path.read_bytes()
    draw = random.Random(7)
    for _ in range(500):
        path.write_bytes(damaged_bytes(sound, draw))
        assert all(isinstance(line, dict) for line in read_lines(path))


@pytest.mark.parametrize("name", ["budget", "W8A8", "mlp-low-precision"])
def test_profiles(tmp_path, name):
    path = tmp_path / "mine.toml"
    path.write_text(load_profile(name).text)

    def read(path: Path) -> None:
        load_profile(str(path))

    fuzz(path, read, 300)


@pytest.mark.parametrize(
    "value", ["1", "-1", "1e400", "nan", '""', "[]", "{}", "true", "[[[[]]]]", "1979-05-27", "'\0'"]
)
def test_keys_of_a_profile_with_odd_values(value):
    known = ("base", "target", "extends", "tier", "rule", "score", "budget", "activations", "protection", "good_for")
    inner = {
        "budget": ("size", "bpw", "kld", "formats", "alike", "floors"),
        "activations": ("smooth", "alpha", "scales", "adapt", "phase", "kv_cache", "prompt_tokens"),
        "protection": ("super_weights", "tolerance", "raise_to"),
    }
    head = 'description = "d"\ngood_for = "g"\n'
    texts = [f'description = "d"\n{key} = {value}\nbase = "Q4_K"\n' for key in known if key != "base"]
    texts += [f'{head}target = "safetensors"\nbase = "W8A8"\n[{t}]\n{k} = {value}\n' for t in inner for k in inner[t]]
    texts += [f'{head}base = "Q4_K"\n[{table}]\n{key} = {value}\n' for table in inner for key in inner[table]]
    for header_line, keys in (
        ("[[rule]]", ("roles", "tensors", "layers", "format")),
        ("[[tier]]", ("share", "format")),
    ):
        texts += [f'{head}base = "Q4_K"\n{header_line}\n{key} = {value}\n' for key in keys]
        rest = 'roles = "output"\nformat = "Q8_0"\n'
        texts += [f'{head}base = "Q4_K"\n[[rule]]\nlayers = {value}\n{rest}']
    for content in texts:
        try:
            parse_profile(content, "mine", "mine.toml")
        except ConvertError:
            continue


@pytest.fixture
def directory(tmp_path) -> Path:
    """A directory artifact of two tensors, one kept and one in a scheme, whose numbers are of no interest."""
    kept = {"norm.weight": ("F32", (32,))}
    stored = dict(kept)
    for suffix, (dtype, shape) in get_scheme("W4A16").tensors(64, 256).items():
        stored[f"q.{suffix}"] = (dtype, shape)
    n_bytes = sum(int(np.prod(shape)) * NUMPY_DTYPES[dtype].itemsize for dtype, shape in stored.values())
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    (artifact / "model.safetensors").write_bytes(header(stored) + bytes(n_bytes))
    rows = [
        {"tensor": "norm.weight", "format": "F32", "shape": [32]},
        {"tensor": "q.weight", "format": "W4A16", "shape": [64, 256], "cache_scales": []},
    ]
    (artifact / RECIPE_NAME).write_text(json.dumps({"tensors": rows, "recipe": {"version": "1"}, "files": []}))
    return artifact


@pytest.mark.parametrize("name", [RECIPE_NAME, "model.safetensors", "model.safetensors.index.json"])
def test_directories(directory, name):
    if name.endswith(".index.json"):  # which is read where there is no single file
        shard = (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
        (directory / name).write_text(json.dumps({"weight_map": dict.fromkeys(read_header(shard)[0], shard.name)}))

    def read(path: Path) -> None:
        inspected(directory)
        artifact = DirectoryArtifact.of_recipe(directory)
        for tensor in artifact.tensors:
            for _ in artifact.blocks(tensor):
                pass

    fuzz(directory / name, read, 250, as_safetensors if name == "model.safetensors" else as_json)


def test_an_index_of_shards(tiny, tmp_path):
    model = shutil.copytree(tiny("llama"), tmp_path / "model")
    fuzz(model / "model.safetensors.index.json", lambda path: open_checkpoint(str(model)), 150, as_json)


def test_templates():
    template = (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{{ loop.index % 2 }}"
        "{{ m['content'] | trim | replace('a', 'b') }}{% else %}{{ raise_exception('x') }}{% endif %}{% endfor %}"
        "{{ messages[0].content.split(' ')[-1] + '%s' % bos_token }}{{ strftime_now('%d') }}{{ ns.n ** 2 }}"
    )
    asked = {"conversation": [{"role": "user", "content": "a b"}], "variables": {}}
    assert "text" in rendered(template, {"bos_token": "<s>"}, asked)
    draw = random.Random(7)
    for _ in range(400):
        damaged = damaged_bytes(template.encode(), draw).decode("utf-8", "replace")
        answer = rendered(damaged, {"bos_token": "<s>"}, asked)
        assert [*answer] in (["text"], ["error"]) and "\n" not in answer.get("error", "")


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_configurations(tiny, tmp_path, name):
    model = shutil.copytree(tiny(name), tmp_path / "model")
    fuzz(model / "config.json", lambda path: describe(open_checkpoint(str(model))), 80, as_json)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizers(tiny, tmp_path, name):
    model = shutil.copytree(tiny("llama"), tmp_path / "model")
    fuzz(model / name, lambda path: describe(open_checkpoint(str(model))), 60, as_json)


def test_sentencepiece_models(tiny, tmp_path):
    model = shutil.copytree(tiny("llama-tied"), tmp_path / "model")
    fuzz(model / "tokenizer.model", lambda path: describe(open_checkpoint(str(model))), 80)
