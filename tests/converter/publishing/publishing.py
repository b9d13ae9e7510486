"""Publishing by the command line to a Hub on this machine, and looking at what is there then."""

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml
from click.testing import CliRunner, Result
from huggingface_hub.utils import close_session

from bitwright.converter.cli import main
from bitwright.converter.job.work_directory import default_work_dir
from bitwright.formats.errors import TryAgain
from bitwright.formats.files.disk import file_sha256
from bitwright.formats.files.seals import write_sealed
from tests.converter.publishing.writable_hub import SIGNATURE, Account, Repository, WritableHub, serve

ROOT = Path(__file__).parents[3]
TOKEN = "hf_0nlyF0rThisTest"
ALICE = Account("alice", organizations={"lab": "contributor", "club": "read"})
TO = "alice/Tiny-GGUF"
SOURCE_CARD = {"license": "llama3.2", "license_link": "LICENSE", "pipeline_tag": "text-generation", "tags": ["chat"]}


def convert(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def report_of(artifact: Path) -> Path:
    return default_work_dir(artifact) / "report.json"


def edit_report(artifact: Path, **changes: Any) -> None:
    seal(report_of(artifact), {**json.loads(report_of(artifact).read_text()), **changes})


def seal(path: Path, record: object) -> None:
    """As a conversion writes its records."""
    write_sealed(path, "report", json.dumps(record).encode())


@contextmanager
def here(monkeypatch, accounts: dict[str, Account], **options: Any) -> Iterator[WritableHub]:
    with serve(accounts, **options) as server, client_log() as log:
        server.add("Org/Tiny", card=SOURCE_CARD)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        close_session()
        yield server
        close_session()
        assert TOKEN not in log.getvalue()


@contextmanager
def client_log() -> Iterator[io.StringIO]:
    """What huggingface_hub and what it stands on log, with the addresses of storage in it, but never a token."""
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    loggers = [logging.getLogger(), logging.getLogger("huggingface_hub")]  # which keeps its records from the root
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield log
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def publish(artifact: Path, *arguments: object, to: str = TO) -> dict[str, Any]:
    done = convert("publish", artifact, "--to", to, "--json", *arguments)
    assert done.exit_code == 0, done.stderr
    keeps_secrets(done)
    return {**json.loads(done.stdout), "stderr": done.stderr}


def refused(artifact: Path, *arguments: object, to: str = TO) -> str:
    done = convert("publish", artifact, "--to", to, *arguments, "--verbose")
    assert done.exit_code in (1, TryAgain.exit_code), done.output
    keeps_secrets(done)
    return done.stderr


def keeps_secrets(done: Result) -> None:
    for secret in (TOKEN, SIGNATURE):
        assert secret not in done.output


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def card_of(hub: WritableHub, repository: str = TO) -> str:
    return hub.files(repository)["README.md"].decode()


def commit(repository: Repository, **files: bytes | None) -> None:
    kept = {path: content for path, content in {**repository.commits[-1][1], **files}.items() if content is not None}
    repository.commit(kept)


def described(path: Path) -> dict[str, Any]:
    return {"path": str(path), "bytes": path.stat().st_size, "sha256": file_sha256(path)}
