"""Whatever is damaged between two runs is noticed, said and made again: the bytes are those of an undisturbed run."""

import re
from fnmatch import fnmatch

import pytest

from tests.faults import scenarios
from tests.faults.disk import Kind, Point, State, restore
from tests.faults.scenarios import SCENARIOS, WORK, check_same

ENCODING: Kind = ("make", ".m.gguf.partial")
SMOOTHED: Kind = ("make", ".m.partial")

# Which file is damaged in which conversion, when: before so many steps of a kind had been taken, or at the end.
TABLE: list[tuple[str, str, Kind | None, int]] = [
    ("plain", "calibration/stream.npz", ("rename", f"{WORK}/calibration/stream.npz"), 2),
    ("plain", "calibration/hidden-1.bin", ("rename", f"{WORK}/calibration/stream.npz"), 2),
    ("plain", "calibration/stream.npz", ENCODING, 0),
    ("plain", "imatrix.gguf", ENCODING, 0),
    ("plain", "seals.jsonl", ENCODING, 0),
    ("plain", "encoded.jsonl", ("rename", "m.gguf"), 0),
    ("plain", "../.m.gguf.partial", ("rename", "m.gguf"), 0),
    ("plain", "plan.json", None, 0),
    ("plain", "report.html", None, 0),
    ("plain", "report.json", None, 0),
    ("refined budget", "analysis/forward/hidden-1.bin", ("rename", f"{WORK}/analysis/backward/stream.npz"), 1),
    ("refined budget", "analysis/backward/stream.npz", ("rename", f"{WORK}/analysis/backward/stream.npz"), 2),
    ("refined budget", "sensitivity.jsonl", ("rename", f"{WORK}/.unsealed-sensitivity.safetensors"), 0),
    ("refined budget", "sensitivity.safetensors", ENCODING, 0),
    ("refined budget", "refinement/measured.jsonl", ("rename", f"{WORK}/corrections.json"), 0),
    ("refined budget", "corrections.json", ENCODING, 0),
    ("feedback", "moments/index.json", ENCODING, 0),
    ("feedback", "moments/*.npz", ENCODING, 0),
    ("feedback", "moments/seals.jsonl", ENCODING, 0),
    ("protection", "super-weights/removals.jsonl", ("rename", f"{WORK}/.unsealed-super_weights.json"), 0),
    ("protection", "super_weights.json", ENCODING, 0),
    ("protection", "protection.json", ENCODING, 0),
    ("protection", "protection.json", None, 0),
    ("judged", "quality.json", ("rename", f"{WORK}/report.json"), 0),
    ("judged", "coherence.json", ("rename", f"{WORK}/report.json"), 0),
    ("judged", "guard/generated.json", ("rename", f"{WORK}/.unsealed-coherence.json"), 0),
    ("smoothed directory", "activation-rows/*.npz", ("rename", f"{WORK}/.unsealed-smoothing.safetensors"), 0),
    ("smoothed directory", "activations.safetensors", SMOOTHED, 0),
    ("smoothed directory", "smoothing.safetensors", SMOOTHED, 0),
    ("smoothed directory", "activations-smoothed.safetensors", SMOOTHED, 0),
    ("smoothed directory", "smoothing.safetensors", None, 0),
]
# Where one kind of damage is enough, as a run takes seconds.
_SLOW = ("refined budget", "protection", "judged")


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]


def zeroed(content: bytes) -> bytes:
    """The first block of bytes from the middle on that are not zeros already."""
    start = next((i for i in range(len(content) // 2, len(content)) if content[i]), 0)
    return content[:start] + bytes(min(64, len(content) - start)) + content[start + 64 :]


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def another_object(content: bytes) -> bytes:
    return b'{"a":1}\n' + content.partition(b"\n")[2] if content.startswith(b'{"') else b'{"a":1}\n'


DAMAGES = {f.__name__: f for f in (flipped, zeroed, cut, another_object)}


def rows() -> list[tuple[str, str, Kind | None, int, str]]:
    found = []
    for i, row in enumerate(TABLE):
        textual = row[1].endswith((".json", ".jsonl"))
        kinds = [name for name in DAMAGES if textual or name != "another_object"]
        found += [(*row, kind) for kind in (kinds if row[0] not in _SLOW else [kinds[i % len(kinds)]])]
    return found


def state_at(points: list[Point], end: State, kind: Kind | None, number: int) -> State:
    if kind is None:
        return end
    return [point.state for point in points if point.kind == kind][number]


@pytest.mark.parametrize(("name", "file", "kind", "number", "damage"), rows())
def test_what_is_damaged_is_made_again(name, file, kind, number, damage, undisturbed, models, root, capsys):
    whole = undisturbed(name)
    state = state_at(whole.points, whole.end, kind, number)
    pattern = f"{WORK}/{file}" if not file.startswith("../") else file[3:]
    path = next(path for path in sorted(state) if fnmatch(path, pattern))
    content = state[path]
    assert content is not None and DAMAGES[damage](content) != content
    restore({**state, path: DAMAGES[damage](content)}, root)
    capsys.readouterr()
    scenarios.run(SCENARIOS[name], models, root, quiet=False)
    check_same(root, whole.end)
    said = capsys.readouterr().err
    # What is not needed any more is not looked at. Files that grow are as a kill may leave them where they are cut, and
    # damaged seals make what they seal suspect.
    needed = (file, kind) != ("calibration/stream.npz", ENCODING)
    grows = file.endswith((".jsonl", ".partial"))
    if needed and not (grows and damage == "cut") and not file.endswith("seals.jsonl"):
        assert re.search(rf"{re.escape(path.rpartition('/')[2])}\W", said), said
