"""Conversions that are killed and that fail: tiny, and each with stages of its own."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitwright import converter
from bitwright.converter.job.progress import Progress
from bitwright.converter.split import split
from tests.converter.gguf import planted_model
from tests.faults.disk import Choice, State, read_state, restore

WORK = "work"
# Files of somebody else, beside the output and the work directory.
FOREIGN: State = {"notes.txt": b"of the user", ".notes.tmp": b"too"}
# What differs from run to run: seconds, times in archives, how often something was done, and identities of files.
_VOLATILE = ("report.json", "report.html", "stream.npz", "seals.jsonl", "replaceable.json", "job.log")


@dataclass(frozen=True)
class Scenario:
    """A conversion of a tiny model into a directory, as m. model: its name, or "planted" for one with a super weight;
    options: of converter.convert; points: at which it is killed, see disk.sample."""

    output: str
    model: str = "llama"
    points: Choice = "kinds"
    options: dict[str, Any] = field(default_factory=dict)


SCENARIOS = {
    "plain": Scenario(
        "m.gguf", points="every", options={"profile": "mlp-low-precision", "overrides": ("mlp_*=IQ4_NL",)}
    ),
    "in shards": Scenario("m.gguf", options={"profile": "uniform-8bit", "shard_bytes": 60_000}),
    "refined budget": Scenario(
        "m.gguf",
        points=20,
        options={"profile": "budget", "target_bpw": 6.0, "refine": 1, "protect_super_weights": "off"},
    ),
    "feedback": Scenario(
        "m.gguf",
        options={"profile": "mlp-low-precision", "overrides": ("mlp_*=Q4_0",), "error_feedback": True},
    ),
    "protection": Scenario(
        "m.gguf", model="planted", points=10, options={"profile": "uniform-8bit", "overrides": ("mlp_down=Q2_K",)}
    ),
    "judged": Scenario("m.gguf", points=6, options={"profile": "uniform-8bit", "judge": "full"}),
    "smoothed directory": Scenario("m", options={"profile": "smoothquant-w8a8", "alpha": "auto"}),
}


def build_models(tiny: Callable[[str], Path], directory: Path) -> dict[str, Path]:
    """The models of the scenarios, and a text for each."""
    planted = planted_model.build(tiny("llama-256"), directory / "planted", 2, {(100, 300): 9.0})
    planted_model.text(planted, directory / "planted.txt")
    characters = random.Random(1)
    text = "".join(characters.choice("abc defghij klmnop 0123456789.\n") for _ in range(8000))
    (directory / "llama.txt").write_text(text)
    return {"llama": tiny("llama"), "planted": planted, "texts": directory}


def run(scenario: Scenario, models: dict[str, Path], root: Path, **options: Any) -> dict[str, Any]:
    return converter.convert(
        str(models[scenario.model]),
        output=root / scenario.output,
        work_dir=root / WORK,
        **{
            "calibration": str(models["texts"] / f"{scenario.model}.txt"),
            "samples": 128,
            "sequence_length": 8,
            "effort": "fast",
            "judge": "off",
            "quiet": True,
            "analysis": "target_bpw" in scenario.options,
            "error_feedback": "off",
            "threads": 1,
            "device": "cpu",
            **scenario.options,
            **options,
        },
    )


def begin(root: Path) -> None:
    restore(FOREIGN, root)


def split_again(root: Path) -> None:
    split(root / "m.gguf", 60_000, root / WORK, Progress(quiet=True))


def check_same(root: Path, expected: State) -> None:
    """The directory has the files of an undisturbed run, no other ones, and their bytes."""
    found = read_state(root)
    assert found.keys() == expected.keys()
    for name, content in expected.items():
        if name.endswith(_VOLATILE):
            continue
        if name.endswith(".jsonl") and content is not None:  # in any order and however often, beside damaged lines
            assert set(content.splitlines()) <= set((found[name] or b"").splitlines()), name
        else:
            assert found[name] == content, name
