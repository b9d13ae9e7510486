"""Work directories: nothing is taken, and nothing deleted, but what a job of ours keeps there."""

import shutil
from pathlib import Path

import pytest

from bitwright.converter.artifact.writer import JOURNAL
from bitwright.converter.job.work_directory import WorkDirectory, default_work_dir
from tests.converter.commands import PLAIN, TEXT, done, refused, snapshot

ROOT = Path(__file__).parents[3]


@pytest.fixture
def home(tiny, tmp_path) -> Path:
    """A directory of somebody's, with names in it that a job might write, and a model."""
    home = tmp_path / "home"
    shutil.copytree(tiny("llama"), home / "model")
    for name in ("imatrix.gguf", "job.json", "lock", "report.html", "notes.txt", "source/code.py", "calibration/a"):
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text('{"tool": "mine"}')
    return home


@pytest.mark.parametrize("fresh", [[], ["--fresh"]])
@pytest.mark.parametrize("place", ["", "model", "source", "calibration"])
def test_a_directory_of_somebody_is_no_work_directory(home, tmp_path, place, fresh):
    before = snapshot(home)
    model, text = home / "model", home / "notes.txt"
    arguments = [*PLAIN, *fresh, "--work-dir", home / place, "--output", tmp_path / "m.gguf", model]
    assert "--work-dir" in refused(*arguments)
    options = ["--calibration", text, "--output", tmp_path / "i.gguf", "--work-dir", home / place]
    assert "--work-dir" in refused("imatrix", *fresh, *options, model)
    assert snapshot(home) == before and not list(tmp_path.glob("*.gguf"))


@pytest.mark.parametrize("content", [[], ["lock"], [".job.json.tmp", "lock"]])
def test_an_empty_directory_and_one_that_a_run_was_killed_in_will_do(tiny, tmp_path, content):
    (tmp_path / "work").mkdir()
    for name in content:
        (tmp_path / "work" / name).touch()
    done(*PLAIN, "--work-dir", tmp_path / "work", "--output", tmp_path / "m.gguf", tiny("llama"))


def test_a_work_directory_holds_no_input_and_no_output(tiny, tmp_path):
    """What --fresh would delete, or what is named like it."""
    model, work, output = tiny("llama"), tmp_path / "m.bitwright", tmp_path / "m.gguf"
    done("imatrix", *TEXT, "--work-dir", work, "--output", tmp_path / "i.gguf", model)
    matrix = work / "imatrix.gguf"
    (work / "text.txt").write_text("a text " * 4000)
    before = snapshot(tmp_path)
    for options in (["--imatrix", matrix], ["--calibration", work / "text.txt"], ["--sensitivity", matrix]):
        for fresh in ([], ["--fresh"]):
            assert "the work directory holds" in refused(*fresh, *options, "--output", output, model)
    for fresh in ([], ["--fresh"]):
        message = refused(*PLAIN, *fresh, "--work-dir", work, "--output", work / "m.gguf", model)
        assert f"the work directory holds {work / 'm.gguf'}" in message
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(work)  # by another name
        assert "holds" in refused(*fresh, "--imatrix", tmp_path / "link" / matrix.name, "--output", output, model)
        (tmp_path / "link").unlink()
    assert snapshot(tmp_path) == before


def test_a_work_directory_inside_of_the_directory_that_is_written(tiny, tmp_path):
    message = refused("--profile", "fp8", "--work-dir", tmp_path / "a/w", "--output", tmp_path / "a", tiny("llama"))
    assert "lies in the output" in message and not (tmp_path / "a" / "w").exists()


def test_fresh_deletes_what_the_stages_keep_and_nothing_else(tiny, tmp_path):
    arguments = [*PLAIN, "--output", tmp_path / "m.gguf", tiny("llama")]
    done(*arguments)
    work = tmp_path / "m.bitwright"
    stale, moved = work / "calibration", tmp_path / "elsewhere"
    stale.mkdir()
    (stale / "stream.npz").write_text("stale")
    moved.mkdir()
    (moved / "code.py").write_text("mine")
    (work / "moments").symlink_to(moved)
    for name in ("notes.txt", "plans/plan.json"):
        (work / name).parent.mkdir(exist_ok=True)
        (work / name).write_text("mine")
    journal = (work / JOURNAL).stat().st_mtime_ns
    done("--fresh", *arguments)
    assert not stale.exists() and (work / JOURNAL).stat().st_mtime_ns > journal
    assert not (work / "moments").is_symlink() and (moved / "code.py").read_text() == "mine"
    assert (work / "notes.txt").read_text() == (work / "plans" / "plan.json").read_text() == "mine"


def test_a_damaged_description_can_be_started_over(tiny, tmp_path):
    arguments = [*PLAIN, "--output", tmp_path / "m.gguf", tiny("llama")]
    done(*arguments)
    description = tmp_path / "m.bitwright" / "job.json"
    description.write_bytes(description.read_bytes()[:200])
    assert "start again with --fresh" in refused(*arguments)
    done("--fresh", *arguments)
    description.write_bytes(b"\0" * 300)  # nothing tells any more whose it is
    assert "no job of this tool" in refused("--fresh", *arguments)


def test_two_outputs_never_share_a_work_directory():
    names = [
        "m",
        "m.gguf",
        "m.dat",
        "m.dat.gguf",
        "m.bitwright",
        "m.bitwright.gguf",
        "m.gguf.gguf",
        "m-00001-of-00002.gguf",
    ]
    assert len({default_work_dir(Path(name)) for name in names}) == len(names)
    long = default_work_dir(Path("x" * 250 + ".gguf"))
    assert len(long.name) <= 255 and long != default_work_dir(Path("x" * 249 + "y.gguf"))


def test_a_directory_and_a_file_of_one_name(tiny, tmp_path):
    """--fresh on the one leaves the other's work alone."""
    text = ["--calibration", "embedded"]
    done(*PLAIN, "--output", tmp_path / "m.gguf", tiny("llama"))
    file_work = snapshot(tmp_path / "m.bitwright")
    for fresh in ([], ["--fresh"]):
        done("--profile", "fp8", "--judge", "off", *text, *fresh, "--output", tmp_path / "m", tiny("llama"))
    assert snapshot(tmp_path / "m.bitwright") == file_work
    done(*PLAIN, "--output", tmp_path / "m.gguf", tiny("llama"))
    assert (tmp_path / "m" / "bitwright.json").exists()


@pytest.mark.parametrize("name", [".", "..", "a/.."])
def test_an_output_needs_a_name(tiny, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert "no name of its own" in refused("--profile", "fp8", "--output", name, tiny("llama"))
    assert "no name of its own" in refused("imatrix", *TEXT, "--output", name, tiny("llama"))
    assert not list(tmp_path.iterdir())


def test_a_work_directory_is_cleared_by_the_names_that_are_written_in_it(tmp_path):
    """Every name that a module puts into a work directory is known to `clear`, or a stale result would stay."""
    import ast
    import importlib

    import bitwright.converter.job.work_directory as job_module

    found = {}
    for path in (ROOT / "converter").rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)):
                continue
            place = ast.unparse(node.left)
            if place.split(".")[-1] != "work_dir" and place != "work.path":
                continue
            if isinstance(node.right, ast.Constant):
                found[node.right.value] = path.name
            elif isinstance(node.right, ast.Name) and node.right.id.isupper():
                module = importlib.import_module(".".join(("bitwright", *path.relative_to(ROOT).with_suffix("").parts)))
                found[getattr(module, node.right.id)] = path.name
    assert len(found) > 20
    assert {name: of for name, of in found.items() if name not in job_module._KEPT} == {}
    work = WorkDirectory(tmp_path / "work")
    with work.locked():
        work.claim({"tool": "1.0+0123456789ab"})
        for name in found:
            (work.path / name).write_text("kept")
        work.clear()
        assert {path.name for path in work.path.iterdir()} == {"job.json", "lock"}
