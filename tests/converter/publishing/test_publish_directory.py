"""Publishing a safetensors directory: every file of it, a card beside what a person wrote, and one to a repository."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

from bitwright.converter.job.work_directory import default_work_dir
from bitwright.converter.publishing import bundle
from bitwright.converter.publishing.card import section
from bitwright.converter.report.data import Artifact, ArtifactFile
from bitwright.formats.files.disk import file_sha256
from bitwright.profiles.planning.summary import TensorGroup
from tests.converter.publishing.publishing import (
    ROOT,
    SOURCE_CARD,
    TOKEN,
    card_of,
    commit,
    convert,
    front_matter,
    publish,
    refused,
    report_of,
    seal,
)
from tests.converter.report.reports import report as report_with

TO = "alice/Tiny-W4A16"
REVISION = "0123456789abcdef0123456789abcdef01234567"
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
RECIPE = {
    f"recipe/model/{name}" for name in ("W4A16.toml", "tiny.imatrix.gguf", "plan.json", "report.html", "report.json")
}
OWN = {"bitwright.json", "chat_template.jinja", "config.json", "generation_config.json", "tokenizer_config.json"}
OWN |= {"tokenizer.json", "LICENSE"}


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory) -> Path:
    """A source with a license and a chat template."""
    path = tmp_path_factory.mktemp("source") / "tiny"
    shutil.copytree(tiny("llama-256"), path)
    (path / "LICENSE").write_text("free")
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def converted(model: Path, output: Path, profile: str, *options: object) -> Path:
    """The directory as its finished conversion of org/tiny left it."""
    short = ["--calibration", "embedded", "--samples", "128", "--sequence-length", "16", "--effort", "fast"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        done = convert(*short, "--judge", "off", "--profile", profile, "--output", output, *options, model)
    assert done.exit_code == 0, done.stderr
    report = json.loads(report_of(output).read_text())
    arguments = [*report["arguments"][:-1], f"org/tiny@{REVISION}"]
    seal(report_of(output), {**report, "model": "org/tiny", "revision": REVISION, "arguments": arguments})
    return output


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> Path:
    return converted(model, tmp_path_factory.mktemp("whole") / "out", "W4A16")


@pytest.fixture(scope="module")
def in_shards(model, tmp_path_factory) -> Path:
    """The same in several files."""
    return converted(model, tmp_path_factory.mktemp("shards") / "out", "W4A16", "--split-size", "600K")


@pytest.fixture
def directory(whole, tmp_path) -> Path:
    """A copy of it, to be changed."""
    shutil.copytree(whole.parent, tmp_path / "copy")
    return tmp_path / "copy" / "out"


def content_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_new_repository(hub, whole):
    result = publish(whole, to=TO)
    files, content = hub.files(TO), content_of(whole)
    assert content.keys() == OWN | {"model.safetensors"}
    assert files.keys() == content.keys() | RECIPE | {"README.md"}
    assert all(files[name] == data for name, data in content.items())
    assert files["recipe/model/tiny.imatrix.gguf"] == (default_work_dir(whole) / "imatrix.gguf").read_bytes()
    assert hub.repositories[TO].private and len(hub.repositories[TO].commits) == 2
    assert result["commit"] == hub.repositories[TO].commits[-1][0]
    report = json.loads(files["recipe/model/report.json"])
    assert {file["path"]: file["sha256"] for file in report["artifact"]["files"]} == {
        path.name: file_sha256(path) for path in whole.iterdir()
    }
    for name, data in files.items():
        assert str(whole.parent).encode() not in data and TOKEN.encode() not in data, name


def test_the_card(hub, whole):
    publish(whole, to=TO)
    card = card_of(hub, TO)
    assert front_matter(card) == {
        "base_model": "Org/Tiny",
        "base_model_relation": "quantized",
        "quantized_by": "alice",
        "library_name": "transformers",
        "license": "llama3.2",
        "license_link": "https://huggingface.co/Org/Tiny/blob/main/LICENSE",
        "pipeline_tag": "text-generation",
        "tags": ["compressed-tensors", "vllm", "bitwright", "chat"],
    }
    for fact in (
        "# Tiny W4A16\n",
        "Safetensors in the compressed-tensors format, for vLLM and transformers, quantized from [Org/Tiny]",
        f"\nvllm serve {TO}\n",
        f'AutoModelForCausalLM.from_pretrained("{TO}", device_map="auto")',
        "carries the source's chat template",
        f"| [model.safetensors](model.safetensors) | {(whole / 'model.safetensors').stat().st_size} |",
        file_sha256(whole / "config.json"),
        "| mlp | W4A16 (12) |",
        f"--seed 0 org/tiny@{REVISION}\n",
        "bitwright --profile recipe/model/W4A16.toml --calibration embedded --samples 128 --sequence-length 16"
        " --calibration-dtype float32 --effort fast --error-feedback quick --seed 0"
        " --imatrix recipe/model/tiny.imatrix.gguf org/",
    ):
        assert fact in card, fact
    assert "GGUF" not in card and "llama-cli" not in card


def test_what_transformers_needs_for_a_scheme_is_said():
    def text(scheme: str, group: str = "mlp") -> str:
        artifact = Artifact("safetensors", 900, (ArtifactFile("model.safetensors", 900, "3" * 64),))
        groups = (TensorGroup(group, 4, {scheme: 3, "BF16": 1}, 1600, 900, 4.5, 1.0),)
        return section(TO, "Org/Tiny", [report_with(artifact=artifact, groups=groups)], chat_template=False)

    assert "quantization_config=CompressedTensorsConfig(dequantize=True)" in text("W4A16_ASYM")
    assert "CompressedTensorsConfig" not in text("W4A16")
    assert "from_pretrained" not in text("W8A8", "experts") and "vllm serve" in text("W8A8", "experts")
    assert "from_pretrained" in text("W8A8") and "from_pretrained" in text("FP8", "experts")


def test_a_second_time_nothing_is_sent(hub, whole):
    first = publish(whole, to=TO)
    hub.requests.clear()
    second = publish(whole, to=TO)
    assert hub.writes() == [] and second["commit"] == first["commit"]
    assert {row["change"] for row in second["files"]} == {"same", "kept"}


def test_a_dry_run_writes_nothing(hub, whole, monkeypatch):
    shown = publish(whole, "--dry-run", to=TO)
    assert hub.writes() == [] and TO not in hub.repositories
    assert {row["path"] for row in shown["files"]} == OWN | RECIPE | {"model.safetensors", "README.md"}
    assert shown["card"] == publish(whole, to=TO)["card"]
    text = convert("publish", whole, "--to", TO, "--dry-run").stdout
    assert "nothing was written" in text and "library_name: transformers" in text
    monkeypatch.chdir(whole)  # the directory by the name that it has from within
    assert publish(Path("."), to=TO)["commit"] is not None


def test_killed_in_the_middle_it_continues(hub, in_shards, tmp_path):
    """The process dies when a shard has arrived and nothing is committed; it is not sent again."""
    command = [sys.executable, "-m", "bitwright.converter", "publish", str(in_shards), "--to", TO]
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    shards = sorted(in_shards.glob("*.safetensors"))
    hashes = {path: file_sha256(path) for path in shards}
    hub.on_stored = lambda oid: process.send_signal(signal.SIGKILL) if oid == hashes[shards[1]] else None
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors
    arrived = {path for path, oid in hashes.items() if oid in hub.storage}  # others may have been on their way
    assert len(hub.repositories[TO].commits) == 1 and shards[1] in arrived

    hub.on_stored = lambda oid: None
    publish(in_shards, to=TO)
    assert {path: hub.stored_bytes[hashes[path]] for path in arrived} == {path: path.stat().st_size for path in arrived}
    assert len(hub.repositories[TO].commits) == 2
    assert all(hub.files(TO)[path.name] == path.read_bytes() for path in in_shards.iterdir())


def test_a_file_that_was_changed_or_taken_away_is_refused(hub, directory):
    for name in ("model.safetensors", "config.json", "tokenizer.json", "bitwright.json"):
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content.replace(b'"', b" ", 1) if name != "bitwright.json" else content + b" ")
        message = refused(directory, to=TO)
        assert "is not the one that the report was made of" in message and name in message
        (directory / name).unlink()
        message = refused(directory, to=TO)
        assert ("bitwright.json" if name == "bitwright.json" else f"{name} is missing") in message
        (directory / name).write_bytes(content)
    shutil.rmtree(default_work_dir(directory))
    assert "name its work directory with --work-dir" in refused(directory, to=TO)
    assert hub.writes() == []


def test_what_is_not_of_the_conversion_stays_here(hub, directory):
    (directory / "notes.txt").write_text("mine")
    (directory / "runs").mkdir()
    (directory / "a\n\x1b[2Jb").write_text("mine")
    shown = publish(directory, to=TO)
    assert shown["notes"] == [r"left out, as no conversion has written it: a\n\x1b[2Jb, notes.txt, runs"]
    assert not {"notes.txt", "runs"} & hub.files(TO).keys()


def test_a_directory_of_another_tool(hub, model):
    assert "has no bitwright.json" in refused(model, to=TO)


def test_the_directorys_own_card_is_what_ours_is_written_into(hub, directory):
    (directory / "README.md").write_text("---\nlicense: mit\ntags: [mine]\n---\n# My model\n\nMy words.\n")
    publish(directory, to=TO)
    card = card_of(hub, TO)
    assert "# My model\n\nMy words.\n\n<!-- bitwright:begin" in card and "vllm serve" in card
    entries = front_matter(card)
    assert entries["license"] == "mit" and entries["tags"][:2] == ["mine", "compressed-tensors"]
    hub.requests.clear()
    assert publish(directory, to=TO)["notes"] == [] and hub.writes() == []
    commit(hub.repositories[TO], **{"README.md": card.replace("My words.", "Better words.").encode()})
    assert "whose words stay" in publish(directory, to=TO)["notes"][0]
    assert "Better words." in card_of(hub, TO)
    (directory / "README.md").write_bytes(b"\xff")
    assert "the card is no UTF-8" in refused(directory, to=TO)
    (directory / "README.md").write_text("---\n- no\n---\n")
    assert "front matter" in refused(directory, to=TO)


def test_a_card_outside_of_the_directory_is_not_read(hub, directory, tmp_path):
    (tmp_path / "key").write_text("secret words")
    for target in (tmp_path / "key", tmp_path / "absent", tmp_path):
        (directory / "README.md").symlink_to(target)
        assert "a link to a place outside of the model" in refused(directory, to=TO)
        (directory / "README.md").unlink()
    os.mkfifo(directory / "README.md")
    assert "a pipe" in refused(directory, to=TO)
    (directory / "README.md").unlink()
    (directory / "README.md").symlink_to("card.txt")
    (directory / "card.txt").write_text("My words.")
    publish(directory, to=TO)
    assert "My words." in card_of(hub, TO) and "secret" not in card_of(hub, TO)


def test_the_order_of_the_files_in_a_report_says_nothing(hub, in_shards, tmp_path):
    shutil.copytree(in_shards.parent, tmp_path / "copy")
    directory = tmp_path / "copy" / "out"
    publish(directory, to=TO)
    before, report = hub.files(TO), json.loads(report_of(directory).read_text())
    report["artifact"]["files"].reverse()
    seal(report_of(directory), report)
    hub.requests.clear()
    publish(directory, to=TO)
    assert hub.writes() == [] and hub.files(TO) == before


def test_a_report_of_files_that_no_conversion_names_so(hub, directory):
    report = json.loads(report_of(directory).read_text())
    first, second, *rest = report["artifact"]["files"]
    measured = report["calibration"]

    def of(*files: dict) -> dict:
        return {"artifact": {**report["artifact"], "files": [*files]}}

    for changes in (
        of(first, first, second, *rest),
        of(first, {**second, "path": "/etc/hosts"}, *rest),
        of(first, {**second, "path": str(directory / ".." / "hosts")}, *rest),
        {"calibration": {**measured, "file": "../../config.json"}},
        {"profile": "../../config"},
    ):
        seal(report_of(directory), {**report, **changes})
        assert "this is no record of a conversion" in refused(directory, to=TO)
    seal(report_of(directory), {**report, **of({**first, "bytes": 1}, second, *rest)})
    assert "is not the one that the report was made of" in refused(directory, to=TO)
    assert hub.writes() == []


def test_files_of_an_earlier_state_are_deleted_and_nothing_else(hub, whole, in_shards):
    publish(in_shards, to=TO)
    shards = {path.name for path in in_shards.glob("*.safetensors")}
    assert len(shards) > 1 and shards | {"model.safetensors.index.json"} <= hub.files(TO).keys()
    # What a person has put there stays: a file of a name of ours, too, and one that a report only claims.
    theirs = {"LICENSE": b"of mine", "notes.txt": b"mine", "preprocessor_config.json": b"{}"}
    commit(hub.repositories[TO], **theirs)
    result = publish(whole, "--replace", to=TO)
    deleted = {row["path"] for row in result["files"] if row["change"] == "deleted"}
    assert deleted == shards | {"model.safetensors.index.json"}
    assert hub.files(TO)["notes.txt"] == b"mine" and hub.files(TO)["preprocessor_config.json"] == b"{}"
    assert hub.files(TO)["LICENSE"] == b"free"  # of this artifact

    publish(in_shards, to=TO)  # the same artifact in another state: nothing is to be replaced
    assert "model.safetensors" not in hub.files(TO)
    index = hub.files(TO)["model.safetensors.index.json"]
    changed = {"model.safetensors.index.json": index + b"\n", min(shards): b"another"}
    commit(hub.repositories[TO], **changed)
    kept = {row["path"]: row["change"] for row in publish(whole, to=TO)["files"]}
    assert all(kept[name] == "kept" for name in changed) and kept[max(shards)] == "deleted"


def test_what_a_report_claims_is_not_deleted(hub, whole):
    publish(whole, to=TO)
    report = json.loads(hub.files(TO)["recipe/model/report.json"])
    claimed = {"notes.txt": b"mine", "LICENSE/of.mine": b"me", "model-1.safetensors": b"!", "tokenizer.model": b"?"}
    report["artifact"]["files"] += [
        {"path": name, "bytes": len(data), "sha256": bundle.RepositoryFile.of_bytes(name, data).sha256}
        for name, data in claimed.items()
    ]
    commit(hub.repositories[TO], **{"recipe/model/report.json": json.dumps(report).encode()}, **claimed)
    result = publish(whole, to=TO)
    assert {row["path"] for row in result["files"] if row["change"] == "deleted"} == {"tokenizer.model"}


def test_another_directory_in_its_place(hub, whole, model, tmp_path):
    publish(whole, to=TO)
    other = converted(model, tmp_path / "out", "FP8")
    message = refused(other, to=TO)
    assert "another artifact of this name (profile W4A16)" in message and "--replace" in message
    assert "--name" not in message
    publish(other, "--replace", to=TO)
    files = hub.files(TO)
    assert files["model.safetensors"] == (other / "model.safetensors").read_bytes()
    assert "recipe/model/FP8.toml" in files and "recipe/model/W4A16.toml" not in files
    assert "recipe/model/tiny.imatrix.gguf" not in files and "# Tiny FP8\n" in card_of(hub, TO)
    hub.add("alice/Other", private=True, files={"config.json": b"{}"})
    message = refused(other, to="alice/Other")
    assert "published by other means" in message and "alice/Other: config.json" in message


def test_a_directory_shares_a_repository_with_nothing(hub, whole):
    gguf = json.dumps(report_with().to_dict()).encode()
    hub.add(TO, private=True, files={"recipe/Tiny-1B/report.json": gguf, "Tiny-1B.gguf": b"GGUF"})
    message = refused(whole, to=TO)
    assert "holds GGUFs" in message and "to a repository of its own" in message
    assert hub.writes() == []


def test_options_of_a_gguf(hub, whole, monkeypatch):
    assert "the files of a directory keep their names" in refused(whole, "--name", "Tiny-113K-v1.0-Q4", to=TO)
    monkeypatch.setattr(bundle, "LARGEST_FILE_BYTES", 600_000)
    assert "convert again with --split-size 20GB" in refused(whole, to=TO)
    assert hub.writes() == []


def test_converted_and_pushed_in_one_command(hub, model, tmp_path):
    hub.add_directory("Org/Tiny", model, card=SOURCE_CARD)
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "bitwright.converter", "--profile", "FP8", "--judge", "off", "--json"]
    command += ["--output", str(tmp_path / "out"), "--push-to", TO, "org/tiny"]

    def run() -> subprocess.CompletedProcess:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert TOKEN not in done.stdout + done.stderr
        return done

    report = json.loads(run().stdout)
    assert report["published"]["commit"] == hub.repositories[TO].commits[-1][0]
    assert all(hub.files(TO)[path.name] == path.read_bytes() for path in (tmp_path / "out").iterdir())
    card, source = card_of(hub, TO), hub.repositories["Org/Tiny"].commits[-1][0]
    assert front_matter(card)["base_model"] == "Org/Tiny"
    assert f"bitwright --profile FP8 --seed 0 org/tiny@{source}" in card
    hub.requests.clear()
    run()
    assert hub.writes() == []
