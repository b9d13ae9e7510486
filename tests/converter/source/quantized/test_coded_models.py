"""A model that is stored in codes converts as the same model does that is stored whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitwright.calibration.control import PassControl
from bitwright.calibration.stream.forward import LayerStream
from bitwright.calibration.stream.streamable import StreamableModel
from bitwright.converter import convert
from bitwright.converter.job.build import build_job
from bitwright.converter.preparation import prepare
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.files.gguf import read_gguf
from tests.converter.source.quantized.coded_models import write_pair
from tests.converter.source.quantized.stored_codes import KINDS
from tests.tiny_models import VOCAB_SIZE

MAIN = [
    *("FP8 in blocks of 128x128", "FP8 per channel", "INT4 in groups", "NVFP4", "NVFP4 of ModelOpt", "MXFP4"),
    *("GPTQ in activation order", "AWQ", "bitnet", "NF4 nested"),
]


def artifact(model: Path, output: Path, profile: str) -> dict[str, tuple[str, np.ndarray]]:
    """Of every tensor of the GGUF its type and values."""
    options: dict[str, Any] = {"judge": "off", "threads": 1, "work_dir": output.with_suffix(".work")}
    convert(str(model), profile, output=output, quiet=True, **options)
    return {t.name: (t.ggml_type.name, t.decode(0, t.n_rows)) for t in read_gguf(output).tensors}


@pytest.mark.parametrize("kind", MAIN)
def test_the_artifact_is_that_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    coded, whole = write_pair(tmp_path, "llama-256", KINDS[kind])
    notes = prepare(build_job(coded, "uniform-8bit", output=tmp_path / "plan.gguf")).notes
    assert any("decoded on reading, calibration runs on the decoded weights" in note for note in notes)
    for profile, step in (("fp16-baseline", 2.0**-10), ("uniform-8bit", 1 / 100)):
        found, expected = (artifact(each, tmp_path / f"{each.name}-{profile}.gguf", profile) for each in (coded, whole))
        assert found.keys() == expected.keys()
        for name, (format_name, values) in expected.items():
            assert found[name][0] == format_name
            # Decoding may round its last bit otherwise, which a code of the artifact may then do, too.
            off = np.abs(found[name][1] - values)
            assert (off <= step * np.abs(values).max()).all() and (off > 0).mean() < 0.02, name


@pytest.mark.parametrize("kind", ["INT4 in groups", "AWQ"])
def test_the_stream_computes_with_the_decoded_weights(kind: str, tmp_path: Path) -> None:
    coded, whole = write_pair(tmp_path, "llama-256", KINDS[kind])
    tokens = np.random.default_rng(7).integers(3, VOCAB_SIZE, (1, 32))

    def states(directory: Path) -> np.ndarray:
        checkpoint = open_checkpoint(str(directory))
        model = StreamableModel(checkpoint, checkpoint.location, device="cpu", dtype="float32")
        stream = LayerStream(model, tokens, PassControl(tmp_path / f"{directory.name}-stream"))
        stream.run()
        return stream.hidden_states(0, 1)[0].numpy()

    found, expected = states(coded), states(whole)
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


def test_a_directory_of_a_coded_model_states_its_own_quantization(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    import json

    coded, whole = write_pair(tmp_path, "llama-256", KINDS["GPTQ"])
    (coded / "quantize_config.json").write_text("{}")
    stated = {}
    for model in (coded, whole):
        output = tmp_path / f"{model.name}-fp8"
        convert(str(model), "fp8", output=output, quiet=True, judge="off", threads=1)
        stated[model] = json.loads((output / "config.json").read_text())
        assert not (output / "quantize_config.json").exists()
    assert stated[coded] == stated[whole]
