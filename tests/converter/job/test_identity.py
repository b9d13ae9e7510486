"""What another version of the code has begun, this one does not finish."""

import json
import shutil
from pathlib import Path

import pytest

from bitwright.converter.job.identity import PACKAGES, code_identity, tool_identity
from tests.converter.commands import PLAIN, done, refused

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the four packages."""
    root = tmp_path_factory.mktemp("tree")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    return root


def identity(root: Path) -> str:
    code_identity.cache_clear()
    return code_identity(root)


def one_of_each_kind() -> dict[str, Path]:
    """A module and a data file of every folder."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.suffix in (".py", ".toml")]
    return {f"{path.parent.relative_to(ROOT)}/*{path.suffix}": path.relative_to(ROOT) for path in sorted(files)}


def test_the_files_are_those_of_every_folder():
    folders = {path.parent for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    kinds = one_of_each_kind()
    assert {ROOT / path.parent for path in kinds.values()} >= folders
    assert {"converter/architectures/*.toml", "profiles/presets/*.toml", "formats/blocks/*.py"} <= set(kinds)


def test_the_same_code_has_the_same_identity_wherever_it_lies(tree):
    assert identity(tree) == identity(ROOT) == tool_identity()


@pytest.mark.parametrize("kind", one_of_each_kind())
def test_a_change_in_any_folder_is_another_identity(tree, kind):
    path = tree / one_of_each_kind()[kind]
    before, content = identity(tree), path.read_bytes()
    path.write_bytes(content + b"\n")
    assert identity(tree) != before
    path.write_bytes(content)
    assert identity(tree) == before


def test_a_file_that_comes_goes_or_is_renamed_is_another_identity(tree):
    before = identity(tree)
    extra = tree / "formats" / "blocks" / "q9_0.py"
    extra.write_bytes(b"")
    with_extra = identity(tree)
    renamed = extra.rename(extra.with_name("q9_1.py"))
    assert len({before, with_extra, identity(tree)}) == 3
    renamed.unlink()
    assert identity(tree) == before


def test_a_job_of_another_version_is_refused(tiny, tmp_path):
    output = tmp_path / "m.gguf"
    arguments = [*PLAIN, "--output", output, tiny("llama")]
    done(*arguments)
    description = tmp_path / "m.bitwright" / "job.json"
    job = json.loads(description.read_bytes())
    job["tool"] = other = job["tool"][:-1] + ("0" if job["tool"][-1] != "0" else "1")
    description.write_text(json.dumps(job))
    before = output.read_bytes()
    message = refused(*arguments)
    assert "another version of this tool began the job" in message
    assert other in message and tool_identity() in message and "--fresh" in message
    assert output.read_bytes() == before
    done("--fresh", *arguments)
