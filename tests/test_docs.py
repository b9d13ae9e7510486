"""Every command of the user guide runs as it is printed."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from converter.cli import main

GUIDE = Path(__file__).parent.parent / "docs" / "guide.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)


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
    assert len([path for path in Path("out").glob("*.gguf") if "-of-" not in path.name]) == 4


def test_the_guides_python(in_a_directory_with_a_model, capsys):
    (code,) = blocks("python")
    exec(compile(code, str(GUIDE), "exec"), {})
    assert (
        float(capsys.readouterr().out)
        == json.loads(Path("out/python.bitwright/report.json").read_text())["quality"]["mean_kld"]
    )
