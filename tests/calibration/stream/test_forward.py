"""Interrupted, resumed, on other threads: the same bytes. Another run's checkpoint and a damaged one are refused."""

import os

import pytest
import torch

from bitwright.calibration.control import Interrupted
from bitwright.calibration.stream.checkpointing import STATE_NAME, HiddenStates
from bitwright.formats.errors import ConvertError
from tests.calibration.stream.streaming import BreaksAt, DictSource, StopAfter, all_bytes, compute, random_corpus
from tests.tiny_models import VOCAB_SIZE

# Six layers of two kinds, and experts.
MODELS = ("gemma3", "qwen3_moe")


def n_layers_of(name: str) -> int:
    return 6 if name == "gemma3" else 2


@pytest.mark.parametrize("name", MODELS)
def test_resumed_after_any_layer_gives_the_same_bytes(name, tiny, tmp_path):
    whole = compute(tiny(name), tmp_path / "whole")
    for n_layers in range(1, n_layers_of(name) + 1):
        work_dir = tmp_path / str(n_layers)
        with pytest.raises(Interrupted, match=f"after layer {n_layers} of"):
            compute(tiny(name), work_dir, should_stop=StopAfter(n_layers))
        source = DictSource.of(tiny(name))
        assert all_bytes(compute(tiny(name), work_dir, source=source)) == all_bytes(whole)
        assert source.reads[f"model.layers.{n_layers - 1}.self_attn.q_proj.weight"] == 0


@pytest.mark.parametrize("layer", range(6))
def test_resumed_after_a_failure_amid_a_layer_gives_the_same_bytes(layer, tiny, tmp_path):
    whole = compute(tiny("gemma3"), tmp_path / "whole")
    source = BreaksAt.of(tiny("gemma3"))
    source.broken_name = f"model.layers.{layer}.mlp.down_proj.weight"
    with pytest.raises(ConnectionError):
        compute(tiny("gemma3"), tmp_path / "work", source=source)
    # What the layer that was cut short has written is in the other file of hidden states.
    torn = tmp_path / "work" / f"hidden-{(layer + 1) % 2}.bin"
    torn.write_bytes(b"\xff" * 1000)
    assert all_bytes(compute(tiny("gemma3"), tmp_path / "work")) == all_bytes(whole)


def test_interrupted_again_and_again_ends_with_the_same_bytes(tiny, tmp_path):
    whole = compute(tiny("gemma3"), tmp_path / "whole")
    for _ in range(6):
        with pytest.raises(Interrupted):
            compute(tiny("gemma3"), tmp_path / "work", should_stop=lambda: True)
    assert all_bytes(compute(tiny("gemma3"), tmp_path / "work", should_stop=lambda: True)) == all_bytes(whole)


@pytest.mark.parametrize("threads", [2, 8])
@pytest.mark.parametrize("name", MODELS)
def test_threads_change_no_byte(name, threads, tiny, tmp_path):
    corpus = random_corpus(n_samples=7)
    single = compute(tiny(name), tmp_path / "1", corpus=corpus, threads=1)
    several = compute(tiny(name), tmp_path / "n", corpus=corpus, threads=threads)
    assert all_bytes(several) == all_bytes(single)


def test_finished_run_leaves_its_statistics_only_and_is_not_run_again(tiny, tmp_path):
    first = compute(tiny("llama"), tmp_path / "work")
    assert [path.name for path in (tmp_path / "work").iterdir()] == [STATE_NAME]
    source = DictSource.of(tiny("llama"))
    assert all_bytes(compute(tiny("llama"), tmp_path / "work", source=source)) == all_bytes(first)
    assert set(source.reads.values()) == {0}


def test_progress_counts_tokens_up_to_all(tiny, tmp_path):
    seen = []
    corpus = random_corpus()
    compute(tiny("llama"), tmp_path / "work", corpus=corpus, progress=lambda *report: seen.append(report))
    done = [report[1] for report in seen]
    assert done == sorted(done)
    assert seen[-1] == ("calibrate", corpus.tokens.size, corpus.tokens.size, "tokens")


@pytest.mark.parametrize(
    ("change", "named"),
    [({"corpus": random_corpus(seed=1)}, "tokens"), ({"name": "another"}, "weights")],
)
def test_checkpoint_of_another_run_is_refused(change, named, tiny, tmp_path):
    with pytest.raises(Interrupted):
        compute(tiny("llama"), tmp_path, should_stop=lambda: True)
    with pytest.raises(ConvertError, match=f"another run's: {named} is"):
        compute(tiny("llama"), tmp_path, **change)


class Told:
    """Progress that remembers what it was to say."""

    def __init__(self):
        self.lines: list[str] = []

    def __call__(self, *_) -> None:
        pass

    def say(self, line: str) -> None:
        self.lines.append(line)


def damages(content: bytes) -> list[bytes]:
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    return [content[:100], content[:-10], b"", b"PK", b"\x00" * 1000, flipped]


@pytest.mark.parametrize("name", [STATE_NAME, "hidden-1.bin"])
def test_a_damaged_checkpoint_is_told_and_the_pass_starts_over(name, tiny, tmp_path):
    whole = all_bytes(compute(tiny("llama"), tmp_path / "whole"))
    for i in range(6):
        work_dir, told = tmp_path / str(i), Told()
        with pytest.raises(Interrupted):
            compute(tiny("llama"), work_dir, should_stop=StopAfter(1))
        (work_dir / name).write_bytes(damages((work_dir / name).read_bytes())[i])
        assert all_bytes(compute(tiny("llama"), work_dir, progress=told)) == whole
        assert len(told.lines) == 1 and name in told.lines[0] and "starts over" in told.lines[0]


def test_damage_in_what_is_not_needed_any_more_changes_nothing(tiny, tmp_path):
    whole, told = all_bytes(compute(tiny("llama"), tmp_path / "whole")), Told()
    with pytest.raises(Interrupted):
        compute(tiny("llama"), tmp_path / "work", should_stop=StopAfter(1))
    (tmp_path / "work" / "hidden-0.bin").write_bytes(b"")
    assert all_bytes(compute(tiny("llama"), tmp_path / "work", progress=told)) == whole and not told.lines


def test_full_disk_is_explained_and_survived(tiny, tmp_path, monkeypatch):
    whole = compute(tiny("llama"), tmp_path / "whole")
    with pytest.raises(Interrupted):
        compute(tiny("llama"), tmp_path / "work", should_stop=StopAfter(1))

    def disk_full(*_) -> int:
        raise OSError(28, "No space left on device")

    for call in ("pwrite", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, disk_full)
            with pytest.raises(ConvertError, match=r"cannot be written \(No space left on device\)"):
                compute(tiny("llama"), tmp_path / "work")
    assert all_bytes(compute(tiny("llama"), tmp_path / "work")) == all_bytes(whole)


def test_token_that_the_model_lacks_is_refused(tiny, tmp_path):
    corpus = random_corpus()
    corpus.tokens[1, 3] = VOCAB_SIZE
    with pytest.raises(ConvertError, match=f"the token {VOCAB_SIZE}, the model knows {VOCAB_SIZE} tokens"):
        compute(tiny("llama"), tmp_path, corpus=corpus)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_come_back_as_they_were(dtype, tmp_path):
    states = HiddenStates(tmp_path / "hidden", 7, dtype)
    written = torch.randn(5, 7, 12).to(dtype)
    states.write(3, written[3:])
    states.write(0, written[:3].transpose(1, 2).contiguous().transpose(1, 2))
    torch.testing.assert_close(states.read(1, 5), written[1:], rtol=0, atol=0)
