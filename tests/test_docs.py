"""Every command of the user guide runs as it is printed."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from converter.cli import main
from profiles.schema import parse_profile, preset_names

GUIDE = Path(__file__).parent.parent / "docs" / "guide.md"


def blocks(language: str, page: Path = GUIDE) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def in_a_directory_with_a_model(tiny, tmp_path, monkeypatch) -> None:
    shutil.copytree(tiny("llama"), tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_the_guide(in_a_directory_with_a_model):
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(commands) >= 10
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "convert"
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
