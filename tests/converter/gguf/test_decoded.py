"""What is run of an artifact: our own decoders on any number of threads read what the gguf package does."""

import numpy as np
import pytest

from bitwright.converter import convert
from bitwright.converter.gguf.verify import DecodedArtifact, verify
from bitwright.converter.model.model_map import describe
from bitwright.converter.model.stored_rows import restore
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.errors import ConvertError

MIX = ("attention_query=Q4_K", "attention_key=NVFP4", "attention_value=IQ4_NL", "mlp_gate=Q5_K", "mlp_down=Q6_K")


def test_the_candidate_is_what_the_independent_decoder_reads(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("bitwright.converter.gguf.verify.CHUNK_WEIGHTS", 5000)  # many parts, the last ones shorter
    path = tmp_path / "m.gguf"
    convert(tiny("llama-256"), "uniform-8bit", path, MIX, quiet=True, judge="off", samples=128, sequence_length=16)
    checkpoint = open_checkpoint(str(tiny("llama-256")))
    model_map = describe(checkpoint)
    candidates = [DecodedArtifact([path], model_map, threads) for threads in (1, 3)]
    assert len({stored.ggml_type for stored in candidates[0].stored.values()}) >= 6
    expected: dict[str, np.ndarray] = {}
    for spec in model_map.tensors:
        restore(spec, candidates[0].stored[spec.name].decode(0, spec.n_rows), expected)
    for name, values in expected.items():
        for candidate in candidates:
            assert np.array_equal(candidate.read(name), values), name
    one, three = (verify([path], checkpoint, model_map, None, lambda *_: None, threads) for threads in (1, 3))
    assert one == three and [error.tensor for error in one] == [spec.name for spec in model_map.tensors]


def test_on_many_threads_the_first_bad_tensor_is_named(tiny, tmp_path):
    path = tmp_path / "m.gguf"
    convert(tiny("llama-256"), "uniform-8bit", path, quiet=True, judge="off", samples=128, sequence_length=16)
    checkpoint = open_checkpoint(str(tiny("llama-256")))
    model_map = describe(checkpoint)
    stored = DecodedArtifact([path], model_map).stored
    bad = [spec.name for spec in model_map.tensors if spec.n_weights > 10_000][2:5]
    data = bytearray(path.read_bytes())
    for name in bad:
        tensor = stored[name]
        data[tensor.offset : tensor.offset + tensor.n_bytes] = b"\x7b" * tensor.n_bytes
    path.write_bytes(data)
    for threads in (1, 4):
        with pytest.raises(ConvertError, match=f"the tensor {bad[0]}"):
            verify([path], checkpoint, model_map, None, lambda *_: None, threads)
