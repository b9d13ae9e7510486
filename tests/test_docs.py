"""Every command of the user guide runs as it is printed, on little text."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from bitwright.converter.cli import main
from bitwright.converter.job.cache import DIRECTORY_VARIABLE
from bitwright.profiles.mixes import MIXES
from bitwright.profiles.reading.schema import parse_profile, preset_names
from scripts import api_reference

GUIDE = Path(__file__).parent.parent / "docs" / "guide.md"
# What measures a model reads this much here, where its own options say nothing else.
QUICK = ["--samples", "128", "--sequence-length", "16"]


def blocks(language: str, page: Path = GUIDE) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def in_a_directory_with_a_model(tiny, tmp_path, monkeypatch) -> None:
    shutil.copytree(tiny("llama"), tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "cache"))


def test_the_guide(in_a_directory_with_a_model):
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(commands) >= 10
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "bitwright"
        if arguments[0].startswith("-"):
            arguments = [*QUICK, *arguments]
        elif arguments[0] == "imatrix" and arguments[-1] == "model":
            arguments[1:1] = QUICK
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, f"{command}\n{done.stderr}"
        assert done.stdout, command
    assert len([path for path in Path("out").glob("*.gguf") if "-of-" not in path.name]) == 6


def test_the_guides_python(in_a_directory_with_a_model, capsys):
    (code,) = blocks("python")
    exec(compile(code, str(GUIDE), "exec"), {})
    assert (
        float(capsys.readouterr().out)
        == json.loads(Path("out/python.bitwright/report.json").read_text())["quality"]["mean_kld"]
    )


@pytest.mark.parametrize("page", ["profiles.md", "add-a-profile.md", "safetensors.md"])
def test_profiles_in_the_documentation_are_valid(page):
    texts = blocks("toml", GUIDE.with_name(page))
    assert texts
    for text in texts:
        assert parse_profile(text, "mine", page).description


def test_every_preset_is_described():
    text = GUIDE.with_name("profiles.md").read_text()
    assert all(f"`{name}`" in text for name in preset_names())


PAGES = [*GUIDE.parent.rglob("*.md"), GUIDE.parent.parent / "README.md"]
_FOLDERS = ("converter", "formats", "calibration", "profiles", "scripts", "tests", "docs")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_is_there(page):
    root = GUIDE.parent.parent
    named = re.findall(rf"`((?:{'|'.join(_FOLDERS)})/[\w./-]*)`", page.read_text())
    linked = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    missing = {path for path in named if "NAME" not in path and not (root / path).exists()}
    missing |= {path for path in linked if not (page.parent / path).exists()}
    assert missing == set()


@pytest.mark.parametrize("page", [*PAGES, GUIDE.parent.parent / "Makefile"], ids=lambda page: page.name)
def test_every_program_that_a_page_runs_is_there(page):
    named = re.findall(r"-m ((?:scripts|bitwright)(?:\.\w+)*)", page.read_text())
    paths = {name: GUIDE.parent.parent / name.replace(".", "/") for name in named}
    missing = {n for n, p in paths.items() if not (p.with_suffix(".py").exists() or (p / "__main__.py").exists())}
    assert missing == set()


def test_the_picture_of_the_architecture_has_every_room():
    (tree,) = blocks("", GUIDE.with_name("architecture.md"))[:1]
    package, drawn = "", set()
    for line in tree.splitlines():
        if not line.startswith(" "):
            package = line.split("/")[0]
        else:
            drawn |= {f"{package}/{name.rstrip('/,')}" for name in re.findall(r"[\w.]+[/,]?(?=[\s,])", line[:22])}
    root = GUIDE.parent.parent
    rooms = {
        str(path.parent.relative_to(root))
        for package in _FOLDERS[:4]
        for path in (root / package).glob("*/*")
        if path.suffix in (".py", ".toml") and path.parent.name != "__pycache__"
    }
    assert rooms - drawn == set()
    assert {name for name in drawn if not (root / name).exists()} == set()


def test_every_page_is_in_the_index():
    docs = GUIDE.parent
    text = (docs / "index.md").read_text()
    named = set(re.findall(r"\]\(([\w/-]+\.md)", text))
    assert named == {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")} - {"index.md"}


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name}: {link}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
                slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in slugs, f"{page.name}: {link}"


def test_the_sizes_of_models_are_those_of_their_bits():
    rows = re.findall(r"^\| ([\d.]+) \| `(\w+)` \| (.*) \|$", GUIDE.with_name("choosing.md").read_text(), re.MULTILINE)
    assert len(rows) == 7
    for bits, mix, sizes in rows:
        assert abs(MIXES[mix].bits - float(bits)) < 0.06
        for billions, size in zip((1, 3, 8, 14, 32, 70), sizes.split(" | "), strict=True):
            assert float(size) == pytest.approx(billions * 1e9 * float(bits) / 8 / 2**30, abs=0.06)


def test_the_api_reference_is_what_the_docstrings_say():
    """Where this fails: python -m scripts.api_reference."""
    text = api_reference.PAGE.read_text()
    assert text == api_reference.reference()
    assert all(f"### {name}" in text for name in ("convert", "plan", "advise", "evaluate", "publish", "inspect"))
