"""Publishing to a Hub on this machine: what arrives, what is sent twice, what goes wrong, and who may not."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import are_progress_bars_disabled

from bitwright.converter.job.work_directory import default_work_dir
from bitwright.converter.publishing import bundle as publication
from bitwright.formats.files.disk import file_sha256
from tests.converter.publishing.publishing import (
    ALICE,
    ROOT,
    SOURCE_CARD,
    TO,
    TOKEN,
    card_of,
    client_log,
    commit,
    convert,
    described,
    edit_report,
    front_matter,
    here,
    publish,
    refused,
    report_of,
    seal,
)
from tests.converter.publishing.writable_hub import Account, Fault

REVISION = "0123456789abcdef0123456789abcdef01234567"
SHORT = [
    "--no-analysis",
    "--calibration",
    "embedded",
    "--samples",
    "128",
    "--sequence-length",
    "16",
    "--effort",
    "fast",
]


@pytest.fixture(scope="module")
def converted(tiny, tmp_path_factory) -> Path:
    """An artifact of the model org/tiny, as its finished conversion left it."""
    directory = tmp_path_factory.mktemp("converted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        done = convert(*SHORT, "--output", directory / "Tiny-113K-v1.0-Q4.gguf", tiny("llama"))
    assert done.exit_code == 0, done.stderr
    path = directory / "Tiny-113K-v1.0-Q4.gguf"
    *options, _ = json.loads(report_of(path).read_text())["arguments"]
    edit_report(path, model="org/tiny", revision=REVISION, arguments=[*options, f"org/tiny@{REVISION}"])
    return path


@pytest.fixture
def artifact(converted, tmp_path) -> Path:
    """A copy of it, to be changed. Its report still names the files of the first one."""
    shutil.copytree(converted.parent, tmp_path / "artifact")
    return tmp_path / "artifact" / converted.name


def test_a_new_repository(hub, converted):
    result = publish(converted)
    files = hub.files(TO)
    recipe = "recipe/Tiny-113K-v1.0-Q4"
    names = ["balanced-4bit.toml", "plan.json", "report.html", "report.json"]
    own = ["Llama-113K.imatrix.gguf", "README.md", "Tiny-113K-v1.0-Q4.gguf"]
    assert sorted(files) == [*own, *(f"{recipe}/{name}" for name in names)]
    assert files["Tiny-113K-v1.0-Q4.gguf"] == converted.read_bytes()
    work_dir = default_work_dir(converted)
    assert files["Llama-113K.imatrix.gguf"] == (work_dir / "imatrix.gguf").read_bytes()
    assert hub.repositories[TO].private
    assert len(hub.repositories[TO].commits) == 2  # the Hub's own, and ours
    assert result["commit"] == hub.repositories[TO].commits[-1][0]

    here = str(converted.parent)
    for name, content in files.items():
        assert TOKEN.encode() not in content
        assert here.encode() not in content or name.endswith(".gguf"), name
    report = json.loads(files[f"{recipe}/report.json"])
    original = json.loads(report_of(converted).read_text())
    assert {key: report[key] for key in ("quality", "errors", "groups", "recipe")} == {
        key: original[key] for key in ("quality", "errors", "groups", "recipe")
    }
    assert report["artifact"]["files"][0]["path"] == "Tiny-113K-v1.0-Q4.gguf"
    assert "output" not in json.loads(files[f"{recipe}/plan.json"])


def test_the_card_of_a_new_repository(hub, converted):
    publish(converted)
    card = card_of(hub)
    assert front_matter(card) == {
        "base_model": "Org/Tiny",  # the checkpoint was opened as org/tiny: the Hub links the exact letters only
        "base_model_relation": "quantized",
        "quantized_by": "alice",
        "library_name": "gguf",
        "license": "llama3.2",
        "license_link": "https://huggingface.co/Org/Tiny/blob/main/LICENSE",
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "bitwright", "imatrix", "chat"],
    }
    report = json.loads(report_of(converted).read_text())
    quality = report["quality"]
    for fact in (
        file_sha256(converted),
        str(converted.stat().st_size),
        f"nats a token | {quality['mean_kld']:.5f} |",
        f"{quality['perplexity']:.4f}",
        f"{quality['top1_agreement']:.2%}",
        report["calibration"]["corpus_sha256"],
        "128, of 16 tokens each",
        REVISION,
        report["tool"],
        f"llama-server -hf {TO}:Q4\n",
    ):
        assert fact in card, fact
    for group in report["groups"]:
        assert f"| {group['group']} |" in card
    assert (
        "bitwright --profile balanced-4bit --no-analysis --calibration embedded --samples 128 --sequence-length 16"
        f" --calibration-dtype float32 --effort fast --error-feedback quick --seed 0 org/tiny@{REVISION}\n" in card
    )


def test_a_sensitivity_table_is_published_beside_the_importance(hub, artifact):
    """Wherever it was: the command on the card names the one in the repository."""
    table = artifact.parent / "own.sensitivity.safetensors"
    table.write_bytes(b"measured")
    manifest = {"file": table.name, "path": str(table), "bytes": 8, "sha256": file_sha256(table)}
    report = json.loads(report_of(artifact).read_text())
    *options, model = report["arguments"]
    edit_report(artifact, sensitivity=manifest, arguments=[*options, f"--sensitivity={table.name}", model])
    publish(artifact)
    files, recipe = hub.files(TO), "recipe/Tiny-113K-v1.0-Q4"
    assert files[f"{recipe}/{table.name}"] == b"measured"
    assert f"--imatrix Llama-113K.imatrix.gguf --sensitivity {recipe}/{table.name} " in card_of(hub)
    assert str(artifact.parent) not in files[f"{recipe}/report.json"].decode()
    table.unlink()
    assert "the sensitivity table of this artifact has been removed" in refused(artifact, to="alice/Other-GGUF")


def test_a_second_time_nothing_is_sent(hub, converted):
    first = publish(converted)
    hub.requests.clear()
    second = publish(converted)
    assert hub.writes() == []
    assert {row["change"] for row in second["files"]} == {"same", "kept"}
    assert second["commit"] == first["commit"]
    assert "already there" in second["stderr"]


def test_a_dry_run_shows_what_comes_and_writes_nothing(hub, converted):
    shown = publish(converted, "--dry-run")
    assert hub.writes() == [] and TO not in hub.repositories
    assert shown["commit"] is None and not shown["exists"] and shown["private"]
    assert {row["change"] for row in shown["files"]} == {"new"}
    done = publish(converted)
    assert shown["card"] == done["card"] == card_of(hub)
    described = {row["path"]: (row["bytes"], row["sha256"]) for row in shown["files"]}
    for path, content in hub.files(TO).items():
        assert described[path][0] == len(content)
        assert described[path][1] == publication.RepositoryFile.of_bytes(path, content).sha256
    text = convert("publish", converted, "--to", TO, "--dry-run").stdout
    assert "there already" in text and "base_model: Org/Tiny" in text and "nothing was written" in text


def test_a_dry_run_needs_no_login_and_no_network(hub, converted, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    shown = publish(converted, "--dry-run")
    assert shown["notes"] == ["not logged in: shown as for a new repository"]
    assert front_matter(shown["card"])["base_model"] == "Org/Tiny"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    shown = publish(converted, "--dry-run")
    assert "does not answer" in shown["notes"][0]
    assert front_matter(shown["card"])["base_model"] == "org/tiny"


LATER = {"Retry-After": "1"}


@pytest.mark.parametrize(
    "fault",
    [
        Fault("GET /api/whoami", 429, LATER),
        Fault("POST /api/repos/create", 503),
        Fault("POST /api/repos/create", "lost"),
        Fault("POST .*/preupload/", 429, LATER),
        Fault("POST .*/objects/batch", 503),
        Fault("PUT /storage/", 503, times=2),
        Fault("PUT /storage/", "cut"),
        Fault("PUT /storage/", "lost"),
        Fault("POST /api/validate-yaml", 503),
        Fault("POST .*/commit/", 429, LATER),
        Fault("POST .*/commit/", "cut"),
        Fault("POST .*/commit/", "lost"),
        Fault("GET .*/tree/", 503),
    ],
    ids=lambda fault: f"{fault.pattern}-{fault.what}",
)
def test_what_passes_is_waited_for(hub, converted, fault):
    fault = replace(fault)
    hub.faults = [fault]
    publish(converted)
    assert fault.times == 0
    assert len(hub.files(TO)) == 7
    assert len(hub.repositories[TO].commits) == 2


@pytest.mark.parametrize("as_date", [False, True])
def test_the_pause_that_the_hub_asks_for_is_kept(hub, converted, monkeypatch, as_date):
    """In seconds, and as a date, which huggingface_hub does not understand."""
    pauses: list[float] = []
    monkeypatch.setattr("bitwright.converter.publishing.repository.time.sleep", pauses.append)
    pause = formatdate(time.time() + 300, usegmt=True) if as_date else "300"
    hub.faults = [Fault("POST /api/validate-yaml", 429, {"Retry-After": pause})]
    publish(converted)
    (waited,) = pauses
    assert 100 < waited <= 301


def test_a_pause_too_long_to_wait_for(hub, converted):
    hub.faults = [Fault("GET /api/whoami", 429, {"Retry-After": "7200"})]
    assert "run the same command again in 120 minutes" in refused(converted)


def test_a_failure_that_stays_is_an_error(hub, converted, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.faults = [Fault("PUT /storage/", 503, times=10_000)]
    with client_log() as log:
        message = refused(converted)
    assert "the Hub did not take it" in message and "503" in message and "is not sent again" in message
    assert "503" in log.getvalue()  # so a token that the client logs would be seen
    assert len(hub.repositories[TO].commits) == 1
    hub.faults = [Fault("", "cut", times=10_000)]
    assert "the Hub does not answer" in refused(converted)
    hub.faults = []
    publish(converted)
    assert len(hub.files(TO)) == 7


def test_the_client_is_left_as_it_is(hub, converted):
    """Over git LFS, too: other threads of a program use the same client."""
    seen = []

    def look(oid: str) -> None:
        handlers = logging.getLogger("huggingface_hub").handlers
        filters = [entry for handler in handlers for entry in handler.filters]
        seen.append((huggingface_hub.constants.HF_HUB_DISABLE_XET, are_progress_bars_disabled(), filters))

    hub.on_stored = look
    publish(converted)
    assert seen and all(state == (False, False, []) for state in seen)


def test_large_files_go_in_parts(monkeypatch, converted):
    with here(monkeypatch, {TOKEN: ALICE}, part_bytes=20_000) as hub:
        hub.faults = [Fault("PUT /storage/.*/2$", "cut"), Fault("PUT /storage/.*/3$", 503)]
        publish(converted)
        assert hub.files(TO)[converted.name] == converted.read_bytes()
        assert len([r for r in hub.requests if r.startswith("PUT") and r.endswith("/1")]) == 1


def test_over_git_lfs_a_failed_attempt_begins_the_file_again(hub, converted, monkeypatch):
    """No byte is read for a hash that is known, and no file stays open."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.lfs.sha_fileobj", lambda file: pytest.fail("a known hash is computed"))
    hub.faults = [Fault("PUT /storage/", 503, times=20)]  # more than huggingface_hub tries by itself
    open_files = open_in(converted.parent)
    assert "trying again" in publish(converted)["stderr"]
    assert hub.files(TO)[converted.name] == converted.read_bytes()
    assert open_in(converted.parent) == open_files and hub.stored_bytes[file_sha256(converted)] == len(
        converted.read_bytes()
    )


def open_in(directory: Path) -> list[str]:
    """The files of the directory that this process has open."""
    targets = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            targets.append(os.readlink(link))
    return sorted(target for target in targets if target.startswith(str(directory)))


def test_a_path_that_no_repository_may_have_is_refused_before_anything_is_sent(hub, artifact):
    importance = default_work_dir(artifact) / "imatrix.gguf"
    report = json.loads(report_of(artifact).read_text())
    edit_report(
        artifact,
        calibration={**report["calibration"], "file": ".git", "path": str(importance)},
        sensitivity={**report["calibration"], "file": ".git"},
    )
    assert "Invalid `path_in_repo`" in refused(artifact)
    assert not hub.stored_bytes and len(hub.repositories[TO].commits) == 1


def test_killed_in_the_middle_it_continues(hub, converted, monkeypatch, tmp_path):
    """The process dies when the weights have arrived and nothing is committed; they are not sent again."""
    command = [sys.executable, "-m", "bitwright.converter", "publish", str(converted), "--to", TO]
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    weights = file_sha256(converted)
    hub.on_stored = lambda oid: process.send_signal(signal.SIGKILL) if oid == weights else None
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors
    assert len(hub.repositories[TO].commits) == 1
    assert weights in hub.stored_bytes  # and perhaps a smaller file that was on its way

    hub.on_stored = lambda oid: None
    publish(converted)
    assert hub.stored_bytes[weights] == converted.stat().st_size
    assert hub.files(TO)[converted.name] == converted.read_bytes()
    assert len(hub.repositories[TO].commits) == 2


@pytest.mark.parametrize(
    ("account", "to", "what"),
    [
        (replace(ALICE, role="read"), TO, "it may only read"),
        (ALICE, "bob/Tiny-GGUF", "alice is no member of bob"),
        (ALICE, "club/Tiny-GGUF", "the role of alice in club is 'read'"),
        (Account("alice", "fineGrained", (("user", "bob", "repo.write"),)), TO, "is not among its scopes"),
        (Account("alice", "fineGrained", (("user", "alice", "repo.content.read"),)), TO, "is not among its scopes"),
        (ALICE, "Org/Tiny", "the Hub refuses writing to it"),
    ],
)
def test_a_token_without_rights(monkeypatch, converted, account, to, what):
    with here(monkeypatch, {TOKEN: account}) as hub:
        message = refused(converted, "--public", to=to)
        assert what in message and "hf auth login" in message
        assert hub.writes() == []


@pytest.mark.parametrize(
    ("account", "to"),
    [
        (ALICE, "lab/Tiny-GGUF"),
        (ALICE, "Alice/Tiny-GGUF"),
        (Account("alice", "fineGrained", (("org", "lab", "repo.write"),)), "lab/Tiny-GGUF"),
    ],
)
def test_a_token_with_rights(monkeypatch, converted, account, to):
    with here(monkeypatch, {TOKEN: account}) as hub:
        publish(converted, to=to)
        assert len(hub.files(to.lower().replace("tiny-gguf", "Tiny-GGUF"))) == 7


def test_tokens_that_are_none(hub, converted, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    assert "Invalid user token" in refused(converted)
    hub.requests.clear()
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN} \x07{TOKEN}")
    assert "characters that no token has" in refused(converted)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    message = refused(converted)
    assert "there is no token for the Hub" in message and "hf auth login" in message
    assert hub.requests == []


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "alice/ti--ny", "alice/tiny.git", "alice/..", "", "alice/ti ny"])
def test_names_that_are_none(hub, converted, name):
    assert "is no name of a repository" in refused(converted, to=name)
    assert hub.requests == []


def test_public_and_private(hub, converted):
    hub.add(TO)
    assert "the repository is public: everybody would see" in refused(converted)
    assert hub.writes() == []
    publish(converted, "--public")
    publish(converted, "--public", to="alice/new")
    assert not hub.repositories["alice/new"].private
    hub.add("alice/old", private=True)
    assert "stays so" in publish(converted, "--public", to="alice/old")["notes"][0]
    assert hub.repositories["alice/old"].private


def test_a_persons_text_stays(hub, converted):
    publish(converted)
    written = card_of(hub)
    theirs = written.replace("license: llama3.2", "license: mit").replace(
        "tags:\n", "datasets:\n- a/b\ntags:\n- mine\n"
    )
    theirs = theirs.replace("<!-- bitwright:begin", "# My words\n\n<!-- bitwright:begin") + "\nAnd a last word.\n"
    theirs = theirs.replace("## Limits", "## No limits")
    commit(hub.repositories[TO], **{"README.md": theirs.encode()})
    publish(converted)
    card = card_of(hub)
    assert card == theirs.replace("## No limits", "## Limits")
    assert front_matter(card)["tags"] == ["mine", "gguf", "bitwright", "imatrix", "chat"]


def test_several_artifacts_share_a_repository(hub, converted, artifact):
    publish(converted)
    first_card = card_of(hub)
    other = other_artifact(artifact, "Tiny-113K-v1.0-Q8")
    publish(other)
    card = card_of(hub)
    assert f"[{converted.name}]({converted.name})" in card and f"[{other.name}]({other.name})" in card
    assert "## Tiny-113K-v1.0-Q4\n" in card and "## Tiny-113K-v1.0-Q8\n" in card
    assert hub.files(TO)[converted.name] == converted.read_bytes()
    hub.requests.clear()
    publish(converted)  # the order of publishing leaves no trace
    assert hub.writes() == []
    # When its weights are deleted by hand, an artifact leaves the card.
    commit(hub.repositories[TO], **{other.name: None})
    result = publish(converted)
    assert "no longer there" in result["notes"][0]
    assert card_of(hub) == first_card


def other_artifact(artifact: Path, stem: str) -> Path:
    """The artifact under another name, by another plan and one byte longer."""
    path = artifact.with_name(f"{stem}.gguf")
    artifact.rename(path)
    default_work_dir(artifact).rename(default_work_dir(path))
    path.write_bytes(path.read_bytes() + b"\0")
    report = json.loads(report_of(path).read_text())
    report["artifact"] |= {"bytes": path.stat().st_size, "files": [described(path)]}
    report["recipe"]["plan_sha256"] = report["plan_sha256"] = "0" * 64
    seal(report_of(path), report)
    plan = default_work_dir(path) / "plan.json"
    seal(plan, {**json.loads(plan.read_text()), "plan_sha256": "0" * 64})
    return path


def test_an_artifact_of_another_model_is_refused(hub, converted, artifact):
    publish(converted)
    other = other_artifact(artifact, "Other-1B-v1.0-Q4")
    hub.add("Org/Other")
    edit_report(other, model="Org/Other")
    assert "holds quantizations of Org/Tiny, and this is one of Org/Other" in refused(other)
    edit_report(other, model="tiny", revision=None)
    assert "and this is one of tiny" in refused(other)
    publish(other, "--base-model", "ORG/tiny")


def test_another_artifact_of_the_same_name(hub, converted, artifact):
    publish(converted)
    other = other_artifact(artifact, artifact.stem)
    message = refused(other)
    assert "another artifact of this name (profile balanced-4bit)" in message and "--replace" in message
    publish(other, "--name", "Tiny-113K-v2.0-Q4")
    assert hub.files(TO)["Tiny-113K-v2.0-Q4.gguf"] == other.read_bytes()
    publish(other, "--replace")
    assert hub.files(TO)[converted.name] == other.read_bytes()


def test_shards_that_are_no_more_are_deleted(hub, converted, artifact):
    sizes = convert("split", artifact, "--split-size", "60K")
    assert sizes.exit_code == 0, sizes.stderr
    shards = [Path(line) for line in sizes.stdout.split()]
    publish(shards[0])
    names = {f"Tiny-113K-v1.0-Q4-{i + 1:05d}-of-{len(shards):05d}.gguf" for i in range(len(shards))}
    assert {name for name in hub.files(TO) if "/" not in name} == {"README.md", "Llama-113K.imatrix.gguf", *names}
    for shard in shards:
        assert hub.files(TO)[shard.name] == shard.read_bytes()
    assert f"llama-server -hf {TO}:Q4\n" in card_of(hub)
    # What somebody else has put there stays, be it beside the recipe or in the place of a shard.
    notes, other = f"recipe/{converted.stem}/notes.txt", f"Tiny-113K-v1.0-Q4-00002-of-{len(shards):05d}.gguf"
    commit(hub.repositories[TO], **{notes: b"mine", other: b"GGUF of mine"})
    result = publish(converted)
    assert {row["path"] for row in result["files"] if row["change"] == "deleted"} == names - {other}
    assert {name for name in hub.files(TO) if "/" not in name} == {
        "README.md",
        "Llama-113K.imatrix.gguf",
        converted.name,
        other,
    }
    assert (hub.files(TO)[notes], hub.files(TO)[other]) == (b"mine", b"GGUF of mine")


def test_a_file_too_large_is_refused_with_the_command_that_splits_it(hub, artifact, monkeypatch):
    monkeypatch.setattr(publication, "LARGEST_FILE_BYTES", 60_000)
    message = refused(artifact)
    line = message.splitlines()[-1]
    program, *arguments = line.partition("split it: ")[2].split()
    assert program == "bitwright"
    done = convert(*arguments[:-1], "60000")  # instead of the Hub's 20GB
    assert done.exit_code == 0, done.stderr
    publish(Path(done.stdout.split()[0]))


def test_a_commit_in_between_is_built_upon(hub, converted):
    def meddle(oid: str) -> None:
        hub.on_stored = lambda oid: None
        commit(hub.repositories[TO], **{"README.md": b"Words of somebody else.\n", "notes.txt": b"theirs"})

    hub.on_stored = meddle
    publish(converted)
    assert hub.files(TO)["notes.txt"] == b"theirs"
    card = card_of(hub)
    assert (
        "Words of somebody else." in card and converted.name in card and front_matter(card)["base_model"] == "Org/Tiny"
    )


def test_a_gitignore_that_leaves_a_file_out_is_noticed(hub, converted):
    hub.add(TO, private=True, files={".gitignore": b"*.toml\n"})
    message = refused(converted)
    assert "balanced-4bit.toml" in message and ".gitignore" in message


def test_a_damaged_report_in_the_repository(hub, converted, artifact):
    other = other_artifact(artifact, "Tiny-113K-v1.0-Q8")
    path = "recipe/Tiny-113K-v1.0-Q4/report.json"
    for damaged in (b"{", b"[]", b'{"base_model": null}', b"\xff"):
        hub.add(TO, private=True, files={path: damaged})
        message = refused(other)
        assert "a report in the repository cannot be read" in message and path in message
        assert "cannot be read" in refused(converted)
        publish(converted, "--replace")


def test_what_the_hub_refuses_in_the_card(hub, converted, artifact):
    source = json.loads(report_of(artifact).read_text())["source"]
    edit_report(artifact, model="tiny", revision=None, source={**source, "card": {"license": "none of any"}})
    message = refused(artifact)
    assert 'Invalid metadata in README.md. - "license" must be one of' in message
    assert "Bad request" in message and "correct what the Hub names" in message
    assert len(hub.repositories[TO].commits) == 1


def test_the_base_model(hub, converted, artifact):
    assert "the Hub has no such model" in refused(converted, "--base-model", "org/absent")
    assert "is no name of a repository" in refused(converted, "--base-model", "absent")
    edit_report(artifact, model="tiny", revision=None)
    shown = publish(artifact, "--dry-run")
    assert "base_model" not in front_matter(shown["card"])
    assert "--base-model" in shown["notes"][0]
    shown = publish(artifact, "--dry-run", "--base-model", "oRG/tINY")
    assert front_matter(shown["card"])["base_model"] == "Org/Tiny"
    edit_report(artifact, model="org/gone", revision=REVISION)
    shown = publish(artifact, "--dry-run")
    assert front_matter(shown["card"])["base_model"] == "org/gone" and "does not show org/gone" in shown["notes"][0]


def test_an_artifact_that_is_not_its_reports(hub, artifact, tmp_path):
    manifest = json.loads(report_of(artifact).read_text())["calibration"]
    edit_report(artifact, calibration={**manifest, "path": str(tmp_path / "moved")})
    publish(artifact, "--dry-run")  # found in the work directory
    importance = default_work_dir(artifact) / "imatrix.gguf"
    importance.write_bytes(importance.read_bytes()[:-1])
    assert "importance matrix of this artifact has been removed or changed" in refused(artifact)
    with artifact.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert "not the one that the report was made of" in refused(artifact)
    report_of(artifact).unlink()
    assert "--work-dir" in refused(artifact)
    assert hub.writes() == []


@pytest.mark.parametrize("name", ["report.json", "plan.json", "report.html"])
def test_records_that_are_not_what_was_written_are_not_published(hub, artifact, name):
    path = default_work_dir(artifact) / name
    content = path.read_bytes()
    for changed in (content[:-10], content.replace(b"balanced", b"unlawful"), b"{}", b"[]", None):
        path.unlink()
        if changed is None:
            os.mkfifo(path)
        else:
            path.write_bytes(changed)
        message = refused(artifact)
        assert "not what was written there" in message and "it makes them anew" in message
    assert hub.writes() == []


def test_records_that_are_none_are_not_published(hub, artifact):
    report = json.loads(report_of(artifact).read_text())
    plan = default_work_dir(artifact) / "plan.json"
    changes = ({"verdict": "fine"}, {"groups": [{}]}, {"artifact": {**report["artifact"], "files": []}}, {"recipe": {}})
    for record in ({}, [], {"artifact": report["artifact"]}, *({**report, **change} for change in changes)):
        seal(report_of(artifact), record)
        assert "this is no record of a conversion" in (message := refused(artifact)) or "no JSON object" in message
    seal(report_of(artifact), {**report, "quality": {**report["quality"], "source_perplexity": 0}})
    assert "the report lacks what the card says" in refused(artifact)
    seal(report_of(artifact), report)
    seal(plan, [])
    assert "no JSON object" in refused(artifact)
    assert hub.writes() == []


def test_a_card_that_is_no_tree_or_has_no_end_is_refused(hub, converted):
    for card, message in ((b"---\na: &a [x]\nb: *a\n---\n", "anchors or aliases"), (b"x" * (1 << 20) + b"x", "bytes")):
        hub.add(TO, private=True, files={"README.md": card})
        assert message in refused(converted)


def test_one_importance_matrix_serves_all_artifacts_of_a_model(hub, artifact):
    """It goes when the last of them does, and one that differs lies beside its recipe."""
    name, own = "Llama-113K.imatrix.gguf", "recipe/{}/Llama-113K.imatrix.gguf"
    first = publish(artifact, "--name", "Tiny-113K-v1.0-A.gguf")
    second = publish(artifact, "--name", "Tiny-113K-v1.0-B.gguf")
    state = {row["path"]: row["change"] for row in second["files"]}
    assert {row["path"]: row["change"] for row in first["files"]}[name] == "new" and state[name] == "same"
    matrix = default_work_dir(artifact) / "imatrix.gguf"
    matrix.write_bytes(matrix.read_bytes() + b" ")
    manifest = json.loads(report_of(artifact).read_text())["calibration"]
    edit_report(artifact, calibration=manifest | {"sha256": file_sha256(matrix), "bytes": matrix.stat().st_size})
    for _ in range(2):  # the second time nothing is left to do
        publish(artifact, "--name", "Tiny-113K-v1.0-B.gguf")
        files = hub.files(TO)
        assert files[own.format("Tiny-113K-v1.0-B")] == matrix.read_bytes() != files[name]
    publish(artifact, "--name", "Tiny-113K-v1.0-A.gguf")
    files = hub.files(TO)
    assert files[name] == matrix.read_bytes() and own.format("Tiny-113K-v1.0-A") not in files


def test_an_importance_matrix_of_somebody_else_stays(hub, converted):
    hub.add(TO, private=True, files={"Llama-113K.imatrix.gguf": b"GGUF of mine"})
    for _ in range(2):
        publish(converted)
        assert hub.files(TO)["Llama-113K.imatrix.gguf"] == b"GGUF of mine"
        assert "recipe/Tiny-113K-v1.0-Q4/Llama-113K.imatrix.gguf" in hub.files(TO)


def test_a_split_artifact_is_published_either_way(hub, artifact):
    shards = [Path(line) for line in convert("split", artifact, "--split-size", "60K").stdout.split()]
    publish(artifact)
    assert hub.files(TO)[artifact.name] == artifact.read_bytes()
    publish(shards[0], to="alice/Shards-GGUF")
    assert {path.name for path in shards} <= hub.files("alice/Shards-GGUF").keys()


def test_names_follow_the_convention(hub, artifact):
    work_dir = default_work_dir(artifact)
    mine = artifact.with_name("mine.gguf")
    artifact.rename(mine)
    report = json.loads((work_dir / "report.json").read_text())
    report["artifact"]["files"] = [described(mine)]
    seal(work_dir / "report.json", report)
    shown = publish(mine, "--dry-run", "--work-dir", work_dir)
    assert shown["files"][0]["path"] == "Llama-113K-BW-Q5_K_M.gguf"
    assert "by the GGUF naming convention" in shown["notes"][-1]
    assert "does not follow" in refused(mine, "--dry-run", "--work-dir", work_dir, "--name", "mine.gguf")
    assert "does not follow" in refused(mine, "--dry-run", "--work-dir", work_dir, "--name", "../Tiny-113K.gguf")


def test_over_xet_where_the_server_has_it(hub, converted, tmp_path):
    """hf_xet writes into a directory in the place of the real storage: its own stand-in for tests."""
    contents = {converted.name: converted, "imatrix.gguf": default_work_dir(converted) / "imatrix.gguf"}
    hub.xet = (f"local://{tmp_path}", {file_sha256(path): path.read_bytes() for path in contents.values()})
    publish(converted)
    assert hub.files(TO)[converted.name] == converted.read_bytes()
    assert not [request for request in hub.requests if "/storage/" in request or "objects/batch" in request]
    stored = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert stored > converted.stat().st_size / 4
    hub.requests.clear()
    publish(converted)
    assert hub.writes() == []


def test_converted_and_pushed_in_one_command(hub, tiny, monkeypatch, tmp_path):
    """The model comes from the Hub, in letters that are not quite its own, and goes back quantized."""
    hub.add_directory("Org/Tiny", tiny("llama"), card=SOURCE_CARD)
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "bitwright.converter", "--profile", "uniform-8bit", "--judge", "off", "--json"]
    command += ["--output", str(tmp_path / "out"), "--push-to", TO, "org/tiny"]

    def run() -> subprocess.CompletedProcess:
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    monkeypatch.setitem(hub.accounts, TOKEN, replace(ALICE, role="read"))
    done = run()
    assert done.returncode == 1 and "it may only read" in done.stderr
    assert not (tmp_path / "out").exists()  # before anything else

    monkeypatch.setitem(hub.accounts, TOKEN, ALICE)
    done = run()
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["published"]["commit"] == hub.repositories[TO].commits[-1][0]
    (artifact,) = (tmp_path / "out").glob("*.gguf")
    assert hub.files(TO)[artifact.name] == artifact.read_bytes()
    card = card_of(hub)
    assert front_matter(card)["base_model"] == "Org/Tiny"
    commit_of_source = hub.repositories["Org/Tiny"].commits[-1][0]
    assert f"bitwright --profile uniform-8bit --seed 0 org/tiny@{commit_of_source}" in card
    assert "No importance matrix was used" in card and "not measured" in card
    hub.requests.clear()
    done = run()
    assert done.returncode == 0 and hub.writes() == []


def test_options_of_pushing_alone(tiny):
    done = convert("--public", tiny("llama"))
    assert done.exit_code == 1 and "--push-to org/name" in done.stderr
    done = convert("--push-to", TO, "--split-size", "30GB", tiny("llama"))
    assert done.exit_code == 1 and "at most 20 GB" in done.stderr
