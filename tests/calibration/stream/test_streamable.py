"""What tells one streamable model from another, and the passes over it."""

from dataclasses import replace
from pathlib import Path

from bitwright.calibration.control import PassControl, never, silent
from bitwright.calibration.stream.streamable import StreamableModel
from tests.calibration.stream.streaming import DictSource


def test_the_identity_is_of_the_weights_and_not_of_how_they_are_run():
    model = StreamableModel(DictSource({}), Path("model"), "org/name", "main")
    others = [replace(model, **{key: "other"}) for key in ("name", "revision", "variant")]
    assert len({model.identity, *(other.identity for other in others)}) == 4
    assert replace(model, device="cpu", dtype="bfloat16", threads=3).identity == model.identity


def test_a_part_of_a_pass_has_its_own_directory_and_the_same_watchers(tmp_path):
    control = PassControl(tmp_path, silent, never)
    assert control.within("part") == PassControl(tmp_path / "part", silent, never)
