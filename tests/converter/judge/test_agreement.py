"""The stage `agreement`: exact files agree in every architecture, and each kind of difference is seen and told."""

import json
import os
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from transformers import AutoTokenizer

from bitwright.calibration.control import Interrupted, never
from bitwright.calibration.stream.forward import LayerStream
from bitwright.converter.artifact.candidate import Candidate
from bitwright.converter.cli import main
from bitwright.converter.gguf.verify import DecodedArtifact
from bitwright.converter.judge.agreement import (
    SCORED,
    Findings,
    compare_logits,
    other_cuts,
    runtime_agreement,
    sliding_window,
)
from bitwright.converter.judge.child import TROUBLED, RuntimeFailed, RuntimeTroubled, converse, quit_failed
from bitwright.converter.judge.judging import Judging
from bitwright.converter.judge.probe import Text
from bitwright.converter.judge.quality import streamed_quality
from bitwright.converter.model.model_map import describe
from bitwright.converter.report.data import Agreement
from bitwright.converter.report.text import agreement_text
from bitwright.converter.report.verdict import EXIT_CODE, findings, is_damaged, overall
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.formats.typed import from_plain
from tests import tiny_models
from tests.converter.artifact.f32_file import write_f32
from tests.converter.report.reports import report
from tests.converter.runs import run_of

QUALITY = {"corpus": "embedded", "mean_kld": 0.0}


@pytest.fixture(scope="module")
def f32(tiny, tmp_path_factory):
    """f32("qwen2") is that tiny model as a GGUF in F32."""
    root = tmp_path_factory.mktemp("f32")

    def write(name: str) -> Path:
        path = root / f"{name}.gguf"
        if not path.exists():
            write_f32(tiny(name), path)
        return path

    return write


def agreement(model: Path, artifact: Path, work_dir: Path, should_stop=never, weights=None) -> dict:
    judging = Judging.of_run(run_of(model, work_dir, should_stop))
    weights = weights or DecodedArtifact([artifact], judging.running[1])
    return runtime_agreement(judging, Candidate(weights, artifact=artifact), QUALITY)


def test_quality_has_run_the_artifact_already(tiny, f32, tmp_path, monkeypatch):
    """Its logits of the first sample serve; where they are damaged the artifact runs again, to the same."""
    passes: list[str] = []
    run_stream = LayerStream.run

    def noted(stream: LayerStream, stage: str = "calibrate") -> None:
        passes.append(stage)
        run_stream(stream, stage)

    monkeypatch.setattr(LayerStream, "run", noted)
    found = []
    for damage in (False, True):
        run = run_of(tiny("llama-256"), tmp_path / str(damage))
        judging = replace(Judging.of_run(run), samples=2)
        candidate = Candidate(DecodedArtifact([f32("llama-256")], run.model_map), artifact=f32("llama-256"))
        streamed_quality(judging, candidate)
        assert np.load(judging.candidate_logits).shape == (255, judging.tokenizer.vocab_size)
        if damage:
            judging.candidate_logits.write_bytes(judging.candidate_logits.read_bytes()[:-8] + b"\0" * 8)
        passes.clear()
        found.append(runtime_agreement(judging, candidate, QUALITY))
        assert ("run the artifact" in passes) == damage
        assert not judging.candidate_logits.exists()
    assert found[0] == found[1] and found[0]["logits"]["scored"] == SCORED - 1


@pytest.mark.parametrize("name", [name for name in tiny_models.TINY_MODELS if name != "llama"])
def test_llama_cpp_agrees_with_the_evaluation_of_an_exact_file(tiny, f32, tmp_path, name):
    found = agreement(tiny(name), f32(name), tmp_path)
    assert found["verdict"] in ("agrees", "differs") and all(cut["known"] for cut in found["cuts"])
    assert found["ends"]["missing"] == found["ends"]["ordinary"] == []
    logits = found["logits"]
    assert logits["mean_kld"] < 1e-6 and logits["relative_error"] < 1e-3 and logits["scored"] == SCORED - 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["agreement.json", "seals.jsonl"]


def test_a_sample_is_longer_than_the_window(tiny):
    checkpoint = open_checkpoint(str(tiny("gemma3")))
    assert sliding_window(checkpoint, describe(checkpoint)) == 64
    wide = replace(checkpoint, config={**checkpoint.config, "sliding_window": 500})
    assert sliding_window(wide, describe(wide)) == 500


class Scaled:
    """An artifact's weights with one matrix doubled: a scale that the runtime does not know of."""

    def __init__(self, weights: DecodedArtifact):
        self._weights, self.tensors = weights, weights.tensors

    def read(self, name: str) -> np.ndarray:
        values = self._weights.read(name)
        return values * np.float32(2) if name == "model.layers.1.mlp.down_proj.weight" else values


def test_a_scale_that_the_runtime_does_not_apply_is_seen(tiny, f32, tmp_path):
    weights = DecodedArtifact([f32("llama-256")], describe(open_checkpoint(str(tiny("llama-256")))))
    found = agreement(tiny("llama-256"), f32("llama-256"), tmp_path, weights=Scaled(weights))
    assert found["verdict"] == "disagrees" and "diverge from our evaluation" in found["reasons"][0]
    read = from_plain(Agreement, found)
    (finding,) = findings(report(quality=None, coherence=None, agreement=read))
    assert "llama.cpp (xllamacpp" in finding and "computes something else" in finding
    assert is_damaged(overall(None, None, read))


def test_a_layer_that_the_runtime_computes_otherwise_is_seen(tiny, f32, tmp_path):
    """The same weights with attention in a window, which the file says nothing of."""
    windowed = shutil.copytree(tiny("qwen2"), tmp_path / "windowed")
    config = json.loads((windowed / "config.json").read_text())
    layer_types = ["sliding_attention"] * config["num_hidden_layers"]
    config |= {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0, "layer_types": layer_types}
    (windowed / "config.json").write_text(json.dumps(config))
    run = run_of(tiny("qwen2"), tmp_path)
    weights = DecodedArtifact([f32("qwen2")], run.model_map)
    judging = Judging.of_run(replace(run, checkpoint=replace(run.checkpoint, location=windowed)))
    found = runtime_agreement(judging, Candidate(weights, artifact=f32("qwen2")), QUALITY)
    assert found["verdict"] == "disagrees" and found["logits"]["relative_error"] > 0.25


def test_another_pre_tokenizer_is_seen_and_strictness_fails(tiny, tmp_path, monkeypatch):
    """Digits one by one in the source, by three in the file; and a token of two digits that tells."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = shutil.copytree(tiny("llama-256"), tmp_path / "model")
    definition = json.loads((model / "tokenizer.json").read_text())
    vocabulary, merges = definition["model"]["vocab"], definition["model"]["merges"]
    vocabulary["12"] = vocabulary.pop("".join(merges.pop()))
    merges.append(["1", "2"])
    (model / "tokenizer.json").write_text(json.dumps(definition))
    arguments = ["--profile", "uniform-8bit", "--pre-tokenizer", "llama-bpe", "--sequence-length", "32", "--strict"]
    arguments += ["--output", str(tmp_path / "m.gguf"), str(model)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == EXIT_CODE, done.stderr
    assert "computes something else than this model: it cuts" in done.stderr
    said = json.loads((tmp_path / "m.bitwright" / "report.json").read_text())
    assert said["agreement"]["verdict"] == "disagrees" and said["verdict"] == "damaged"
    assert "What the runtime computes" in (tmp_path / "m.bitwright" / "report.html").read_text()


def test_an_end_that_the_file_does_not_state_is_seen(tiny, f32, tmp_path):
    """The source ends at a word of its own, the file at none that the source knows."""
    other = shutil.copytree(tiny("llama-256"), tmp_path / "other")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        settings = json.loads((other / name).read_text())
        settings.pop("eos_token", None)
        (other / name).write_text(json.dumps(settings | ({} if "tokenizer" in name else {"eos_token_id": 300})))
    found = agreement(other, f32("llama-256"), tmp_path)
    assert found["verdict"] == "disagrees" and len(found["ends"]["missing"]) == 1
    assert "does not end at" in found["reasons"][0]


def test_what_no_runtime_can_load_is_a_finding_and_what_is_absent_none(tiny, f32, tmp_path, monkeypatch):
    broken = tmp_path / "broken.gguf"
    write_f32(tiny("llama-256"), broken, without=("llama.attention.layer_norm_rms_epsilon",))
    found = agreement(tiny("llama-256"), broken, tmp_path / "broken")
    assert found["verdict"] == "disagrees" and "does not run the artifact" in found["reasons"][0]
    with monkeypatch.context() as patch:
        patch.setattr("bitwright.converter.judge.child.installed", lambda: False)
        found = agreement(tiny("llama-256"), f32("llama-256"), tmp_path / "absent")
        assert agreement(tiny("llama-256"), f32("llama-256"), tmp_path / "absent") == found
    assert found["verdict"] is None and "xllamacpp is not installed" in found["unchecked"][0]
    assert overall(None, None, from_plain(Agreement, found)) is None
    assert agreement(tiny("llama-256"), f32("llama-256"), tmp_path / "absent")["verdict"] == "agrees"  # installed since


def test_too_large_for_this_machine_is_said_and_the_rest_is_checked(tiny, f32, tmp_path, monkeypatch):
    class Memory:
        available = 1000

    with monkeypatch.context() as patch:
        patch.setattr("bitwright.converter.judge.agreement.psutil.virtual_memory", Memory)
        found = agreement(tiny("llama-256"), f32("llama-256"), tmp_path)
    assert found["verdict"] is None and found["logits"] is None and found["texts"] > 10 and not found["cuts"]
    assert found["unchecked"][0].startswith("logits: llama.cpp takes") and found["lacking"] > 1000
    text = agreement_text(from_plain(Agreement, found))
    assert "14 of 14 texts cut alike" in text and "not judged" in text
    assert agreement(tiny("llama-256"), f32("llama-256"), tmp_path)["verdict"] == "agrees"  # there is memory now


@pytest.mark.parametrize("n_kills", [1, 2])
def test_a_child_that_the_system_ends_is_started_once_more_and_never_judged(tiny, f32, tmp_path, monkeypatch, n_kills):
    """As when memory runs out. The next run of the same stage judges."""
    kills = iter(range(n_kills))

    class Killed(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            if next(kills, None) is not None:
                os.kill(self.pid, signal.SIGKILL)

    monkeypatch.setattr(subprocess, "Popen", Killed)
    if n_kills == 2:
        with pytest.raises(RuntimeTroubled, match="SIGKILL, 2 times"):
            agreement(tiny("llama-256"), f32("llama-256"), tmp_path)
        assert not (tmp_path / "agreement.json").exists()
    assert agreement(tiny("llama-256"), f32("llama-256"), tmp_path)["verdict"] == "agrees"


def test_a_child_that_stands_still_is_given_up(monkeypatch):
    class Sleeps(subprocess.Popen):
        def __init__(self, _, **options):
            super().__init__(["sleep", "600"], **options)

    monkeypatch.setattr(subprocess, "Popen", Sleeps)
    with pytest.raises(RuntimeTroubled, match=r"llama\.cpp stood still for 0 s, 2 times"):
        converse("any", {}, 1, name="llama.cpp", patience=0.3, should_stop=never)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError(), TROUBLED),
        (OSError(28, "No space left on device"), TROUBLED),
        (ValueError("llama.cpp cannot load m.gguf: std::bad_alloc"), TROUBLED),
        (OSError("m does not appear to have a file named x"), 1),
        (ValueError("wrong number of tensors"), 1),
    ],
)
def test_want_of_memory_or_space_is_no_finding(error, code, monkeypatch):
    with pytest.raises(SystemExit) as ended:
        quit_failed(error)
    assert ended.value.code == code

    class Ends(subprocess.Popen):
        def __init__(self, _, **options):
            super().__init__(["sh", "-c", f"echo the reason >&2; exit {code}"], **options)

    monkeypatch.setattr(subprocess, "Popen", Ends)
    expected = RuntimeTroubled if code == TROUBLED else RuntimeFailed
    with pytest.raises(expected, match="the reason"):
        converse("any", {}, 1, name="llama.cpp", patience=9, should_stop=never)


@pytest.mark.parametrize("name", ["llama-llama3", "llama-yarn", "phi3-longrope", "mistral", "qwen2"])
def test_a_gguf_as_the_source_is_judged_by_itself(tiny, f32, tmp_path, name):
    """transformers reads neither the scaling of positions of a GGUF, nor all of its ends, nor where it puts spaces."""
    found = agreement(f32(name), f32(name), tmp_path, weights=None)
    assert found["verdict"] == "agrees" and not found["cuts"] and found["logits"]["relative_error"] < 1e-3


def test_evaluate_takes_a_gguf_as_the_source_by_itself(f32, monkeypatch):
    """As a conversion does: transformers cuts text otherwise with the tokenizer that it makes of this file."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = ["--samples", "2", "--sequence-length", "32", "--device", "cpu", "--json"]
    done = CliRunner().invoke(main, ["evaluate", str(f32("mistral")), "--against", str(f32("mistral")), *options])
    assert done.exit_code == 0, done.stderr
    quality = json.loads(done.stdout)
    assert quality["agreement"]["verdict"] == "agrees" and quality["mean_kld"] < 1e-6


def test_a_scaling_of_positions_that_is_not_understood_is_refused(tiny, tmp_path):
    write_f32(tiny("llama-llama3"), tmp_path / "m.gguf", factors=(1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0))
    with pytest.raises(ConvertError, match="leaves out rope_freqs"):
        agreement(tmp_path / "m.gguf", tmp_path / "m.gguf", tmp_path)


def test_other_words_in_a_conversation_are_no_known_difference(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama-256"))
    text = Text("<|im_start|>the quick brown fox<|im_end|> jumps over the lazy dog", special=False)
    ours = tokenizer(text.text, add_special_tokens=False)["input_ids"]
    begin, end = ours[0], tokenizer.convert_tokens_to_ids("<|im_end|>")
    place = ours.index(end)
    first_word = [*ours[:1], *tokenizer("x")["input_ids"], *ours[2:]]
    others = [begin, *[77] * 10, end, *ours[place + 1 :]]
    assert [cut["known"] for cut in other_cuts(tokenizer, [text] * 2, [ours] * 2, [first_word, others])] == [
        True,
        False,
    ]


def test_it_stops_when_asked(tiny, f32, tmp_path):
    with pytest.raises(Interrupted):
        agreement(tiny("llama-256"), f32("llama-256"), tmp_path, should_stop=lambda: True)
    assert agreement(tiny("llama-256"), f32("llama-256"), tmp_path)["verdict"] == "agrees"


@pytest.mark.parametrize("profile", ["w4a16", "NVFP4"])
def test_transformers_agrees_with_the_evaluation_of_a_directory(tiny, tmp_path, monkeypatch, profile):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    arguments = ["--profile", profile, "--calibration", str(tmp_path / "text.txt"), "--samples", "128", "--json"]
    arguments += ["--sequence-length", "16", "--output", str(tmp_path / "m"), str(tiny("llama-256"))]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)["agreement"]
    assert found["verdict"] == "agrees" and found["runtime"].startswith("transformers"), found["reasons"]
    assert found["logits"]["mean_kld"] is not None and not found["cuts"] and not found["ends"]["missing"]


def test_a_directory_that_transformers_does_not_read_is_said_to_be_so(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = ["--profile", "W8A8", "--json", "--sequence-length", "16", "--output", str(tmp_path / "m")]
    done = CliRunner().invoke(main, [*arguments, str(tiny("qwen3_moe"))])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)["agreement"]
    assert found["verdict"] is None and "no experts whose inputs are rounded" in found["unchecked"][0]


def test_logits_are_compared_by_divergence_and_by_error():
    logits = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32)
    same = compare_logits(logits, logits + np.float32(3))  # a constant changes no distribution
    assert same["mean_kld"] < 1e-9 and same["relative_error"] < 1e-6 and same["top1_agreement"] == 1
    other = compare_logits(logits, 2 * logits)
    assert other["mean_kld"] > 0.05 and other["relative_error"] == pytest.approx(1, abs=1e-5)
    assert compare_logits(logits, np.full_like(logits, np.nan))["mean_kld"] is None
    lost = {**compare_logits(logits, np.full_like(logits, np.nan)), "tokens": 10, "scored": 5}
    assert Findings("llama.cpp", texts=1, logits=lost).to_dict()["verdict"] == "disagrees"
