"""The walks of three users, docs/walks/*.md: every command runs as it is printed, on small models."""

import glob
import json
import re
import shlex
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
from click.testing import CliRunner

from bitwright.converter.cli import main
from bitwright.converter.job.cache import DIRECTORY_VARIABLE
from tests.converter.publishing.publishing import ALICE, TOKEN, here

WALKS = Path(__file__).parent.parent / "docs" / "walks"
# What conversions take here beside their own options, to be quick: the way is shown, not figures. No text is fetched.
QUICK = ["--samples", "128", "--sequence-length", "16", "--calibration", "embedded", "--no-error-feedback"]
QUICK += ["--effort", "fast"]


@pytest.fixture
def street(tiny, tmp_path, monkeypatch):
    """Builds models under these names in a directory of their own, which is then the current one."""

    def build(tiny_name: str, *names: str) -> None:
        for name in names:
            shutil.copytree(tiny(tiny_name), tmp_path / name)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "cache"))

    return build


def blocks(walk: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (WALKS / walk).read_text(), re.MULTILINE | re.DOTALL)


def walked(monkeypatch: pytest.MonkeyPatch, walk: str, *conversions_take: str) -> dict[str, str]:
    """Every command of the page -> what it printed. What is published finds a Hub on this machine, and the models there
    as they are here. conversions_take: options that conversions get beside their own."""
    printed = {}
    for command in (line for block in blocks(walk, "sh") for line in block.splitlines()):
        program, *arguments = shlex.split(command)
        assert program == "bitwright"
        arguments = [name for each in arguments for name in (sorted(glob.glob(each)) or [each])]
        if arguments[0].startswith("-"):
            arguments = [*arguments[:-1], *QUICK, *conversions_take, arguments[-1]]
        with nullcontext() if arguments[0] != "publish" else here(monkeypatch, {TOKEN: ALICE}) as hub:
            for model in Path("org").iterdir() if hub is not None else ():
                hub.add(str(model))
            done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, f"{command}\n{done.output}"
        printed[command] = done.stdout
    return printed


def said(printed: dict[str, str], beginning: str) -> str:
    (text,) = (text for command, text in printed.items() if command.startswith(beginning))
    return text


def test_the_hobbyist(street, monkeypatch):
    street("llama", "org/model")
    printed = walked(monkeypatch, "hobbyist.md")
    (artifact,) = Path("out").glob("*.gguf")
    first = said(printed, "bitwright --target-size 5GiB")
    assert first.splitlines()[0].startswith("Verdict: near-lossless (KLD") and f"llama-server -m {artifact}" in first
    assert "best here: " in said(printed, "bitwright advise")
    assert "budget" in said(printed, "bitwright inspect")
    assert said(printed, "bitwright evaluate").startswith("Verdict: ")
    assert len([*Path("out/larger").glob("*.gguf")]) == 1


def test_the_publisher(street, monkeypatch):
    street("llama-256", "org/first", "org/second")
    (jobs,) = blocks("publisher.md", "jobs.txt")
    quick = shlex.join([*QUICK, "--judge", "off"])
    Path("jobs.txt").write_text(re.sub(r"(?m)^--ladder", f"{quick} --ladder", jobs).replace(" --judge fast", ""))
    printed = walked(monkeypatch, "publisher.md", "--judge", "off")
    rungs = said(printed, "bitwright --ladder").splitlines()[2:-1]
    assert len(rungs) == 15 == len([*Path("out/first").glob("*-BW-*.gguf")])
    assert Path("out/first/ladder.html").is_file() and len([*Path("out/second").glob("*-BW-*.gguf")]) == 2
    outcomes = json.loads(said(printed, "bitwright batch"))
    assert [outcome["code"] for outcome in outcomes] == [0, 0]
    card = said(printed, "bitwright publish")
    assert "base_model: org/first" in card and "-BW-Q4_K_M.gguf" in card and "recipe/" in card


def test_the_operator(street, monkeypatch):
    street("llama-256", "org/model")
    printed = walked(monkeypatch, "operator.md", "--judge", "off")
    assert "vLLM can cut this plan over 2 GPUs" in said(printed, "bitwright plan")
    schemes = {
        name: json.loads(Path("out", name, "config.json").read_text())["quantization_config"]["format"]
        for name in ("w8a8", "fp8", "w4a16", "nvfp4")
    }
    assert schemes == {
        "w8a8": "int-quantized",
        "fp8": "float-quantized",
        "w4a16": "pack-quantized",
        "nvfp4": "nvfp4-pack-quantized",
    }
    verdicts = [text for command, text in printed.items() if command.startswith("bitwright --profile")]
    assert len(verdicts) == 4 and all(text.startswith("Verdict: ") for text in verdicts)
    loaded = said(printed, "bitwright check")
    assert re.match(r"transformers 5\S* loads out/fp8 and continues 'The capital of France is':\n.", loaded)
    assert "compressed-tensors" in said(printed, "bitwright publish")
