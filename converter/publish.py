"""The stage `publish`: an artifact, what made it and a card about it into a model repository on the Hub."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter import model_card
from converter.front_matter import LARGEST_CARD_BYTES
from converter.hub_repository import (
    Changed,
    HubRepository,
    RepositoryFile,
    RepositoryState,
    Unreachable,
    check_repository_name,
    stored_token,
)
from converter.progress import Progress
from converter.publication import (
    LARGEST_FILE_BYTES,
    MEASURED,
    RECIPE_NAMES,
    RECIPES,
    FinishedArtifact,
    files_to_publish,
    load_artifact,
    published_report,
    repository_stem,
)
from converter.recipe import profile_file
from converter.records import REPORT
from formats.errors import ConvertError
from formats.regular_file import LARGEST_METADATA_BYTES

CARD = "README.md"
_REPORTS = re.compile(rf"{RECIPES}/([^/]+)/{re.escape(REPORT)}")
# What a card is not made of raises.
_NO_REPORT = (KeyError, TypeError, ValueError, IndexError, AttributeError, ZeroDivisionError, RecursionError)
# How often somebody else may change the repository while we publish.
_ROUNDS = 4


@dataclass(frozen=True)
class Target:
    """Where and how to publish.

    repository: org/name. public: make a new repository public, and agree to write to a public one. base_model: the
    source's id on the Hub, where the artifact does not know it. name: the artifact's file name in the repository.
    replace: put the artifact in the place of another one that has its name.
    """

    repository: str
    public: bool = False
    base_model: str | None = None
    name: str | None = None
    replace: bool = False


@dataclass(frozen=True)
class Base:
    """The model that an artifact was made of, as the Hub knows it; card: what its card says."""

    model_id: str | None
    card: dict[str, Any]


@dataclass(frozen=True)
class Change:
    """What a repository becomes: its files by name as they are to be, those to send, those to delete, its card."""

    files: list[RepositoryFile]
    sent: list[RepositoryFile]
    deleted: list[str]
    card: str


class UnreadableReport(ConvertError):
    """A published report that lacks what a card needs."""


def preflight(target: Target, shard_bytes: int | None, say: Callable[[str], None]) -> None:
    """What would stop the publishing, before anything long begins. Raises ConvertError."""
    check_repository_name(target.repository, "--push-to")
    if shard_bytes is None or shard_bytes > LARGEST_FILE_BYTES:
        raise ConvertError("the Hub asks for files of at most 20 GB", "--split-size", "leave it out, or give less")
    repository = HubRepository(target.repository, say, stored_token())
    _check_visibility(target, repository.check_rights(), say)
    if target.base_model is not None:
        _find_base(repository, target.base_model, required=True)


def publish(
    artifact: Path, target: Target, progress: Progress, *, work_dir: Path | None = None, dry_run: bool = False
) -> dict[str, Any]:
    """Publish the artifact that begins with this file; returns what the repository holds then.

    dry_run: change nothing; without a login or a network the repository is taken for a new one. Raises ConvertError;
    the same call again continues, and one after the last finds nothing to do.
    """
    check_repository_name(target.repository, "--to")
    notes: list[str] = []

    def note(text: str) -> None:
        if text not in notes:
            notes.append(text)
            progress.say(text)

    token = stored_token()
    repository = HubRepository(target.repository, progress.say, token, patient=not dry_run)
    if not dry_run:
        repository.check_rights()  # before every byte of the artifact is read
    finished = load_artifact(artifact, work_dir, progress)
    state, base = _look(repository, target, finished.report, note, dry_run)
    stem = repository_stem(finished, target.name)
    if stem not in finished.paths[0].name:
        note(f"in the repository the artifact is called {stem}.gguf, by the GGUF naming convention")
    for _ in range(_ROUNDS):
        change = _change(repository, state, finished, stem, target, base, note)
        if dry_run:
            return _result(repository, target, state, change, None, notes)
        if state is None:
            repository.create(target.public)
        elif not change.sent and not change.deleted:
            progress.say("already there: every file has the hash that it would be sent with")
            return _result(repository, target, state, change, state.commit, notes)
        else:
            try:
                commit = repository.upload(change.sent, change.deleted, state, f"Publish {stem}")
            except Changed:
                progress.say("the repository has changed meanwhile: looking again")
            else:
                _check_arrival(repository, change)
                return _result(repository, target, state, change, commit, notes)
        state = _existing(repository)
    raise ConvertError(
        "somebody else keeps changing the repository", target.repository, "run the same command again when that is done"
    )


def _look(
    repository: HubRepository, target: Target, report: dict[str, Any], note: Callable[[str], None], dry_run: bool
) -> tuple[RepositoryState | None, Base]:
    """The repository and the base model as they are on the Hub. A dry run needs no rights, and not even a Hub."""
    try:
        state = repository.state() if dry_run else repository.check_rights()
        _check_visibility(target, state, note)
        if state is None and repository.token is None:
            note("not logged in: shown as for a new repository")
        return state, _base(repository, target, report, note)
    except Unreachable as error:
        if not dry_run:
            raise
        note(f"{error.what}: shown as for a new repository, with the base model as it was given")
        return None, Base(target.base_model or _opened_id(report), report["source"]["card"])


def _existing(repository: HubRepository) -> RepositoryState:
    state = repository.state()
    if state is None:
        raise ConvertError(
            "the repository is there, but this token may not see it",
            repository.name,
            "use a token with access to it: hf auth login --force; or another name",
        )
    return state


def _check_visibility(target: Target, state: RepositoryState | None, say: Callable[[str], None]) -> None:
    if state is None:
        return
    if not state.private and not target.public:
        raise ConvertError(
            "the repository is public: everybody would see what is published",
            target.repository,
            "agree with --public, or name another repository, which will be private",
        )
    if state.private and target.public:
        say("the repository is private and stays so; its settings on the Hub can make it public")


def _base(repository: HubRepository, target: Target, report: dict[str, Any], note: Callable[[str], None]) -> Base:
    """The base model with the spelling and the card that the Hub has, or what the report knows."""
    known = Base(_opened_id(report), report["source"]["card"])
    if target.base_model is None and known.model_id is None:
        note("the source is a local checkpoint: the card names no base_model; give it with --base-model org/name")
        return known
    base = _find_base(repository, target.base_model or str(known.model_id), target.base_model is not None)
    if base is None:
        note(f"the Hub does not show {known.model_id} (private, or gone): the card names it as it was opened")
        return known
    return Base(base.model_id, {**known.card, **base.card})


def _opened_id(report: dict[str, Any]) -> str | None:
    """The Hub id that the checkpoint was opened with; None for a local one, which has no revision."""
    return report["model"] if report["revision"] else None


def _find_base(repository: HubRepository, model_id: str, required: bool) -> Base | None:
    """A model on the Hub; where it is not there, None, or an error for a required one."""
    check_repository_name(model_id, "--base-model")
    found = repository.model(model_id)
    if found is None and required:
        raise ConvertError(
            "the Hub has no such model, or this token may not see it", f"--base-model {model_id}", "check the id"
        )
    return Base(*found) if found else None


def _change(
    repository: HubRepository,
    state: RepositoryState | None,
    finished: FinishedArtifact,
    stem: str,
    target: Target,
    base: Base,
    note: Callable[[str], None],
) -> Change:
    """What the repository is to be after this artifact is in it."""
    report = published_report(finished, stem, base.model_id)
    files = files_to_publish(finished, report)
    present = state.files if state is not None else {}
    reports = _other_reports(repository, state, stem, base, finished, note) if state is not None else []
    deleted = _obsolete(repository, state, stem, report, files, target) if state is not None else []
    try:
        existing = None
        if state is not None and CARD in present:
            existing = _fetch(repository, state, CARD, LARGEST_CARD_BYTES).decode()
    except UnicodeDecodeError:
        raise ConvertError("the card is no UTF-8 text", f"{repository.name}: {CARD}", "mend it on the Hub") from None
    entries = model_card.front_matter(
        base.model_id, base.card, repository.name.partition("/")[0], report["calibration"] is not None
    )
    reports = [report, *reports]
    try:
        section = model_card.section(repository.name, base.model_id, reports, finished.has_chat_template)
    except _NO_REPORT as error:  # the others have been tried
        raise ConvertError(
            f"the report lacks what the card says: {type(error).__name__} {error}",
            str(finished.work_dir / REPORT),
            "run the same conversion again, it makes it anew",
        ) from None
    card = model_card.write_card(existing, entries, section, f"{repository.name}: {CARD}")
    files.append(RepositoryFile.of_bytes(CARD, card.encode()))
    sent = [file for file in files if file.path not in present or not present[file.path].same_as(file)]
    return Change(files, sent, deleted, card)


def _other_reports(
    repository: HubRepository,
    state: RepositoryState,
    stem: str,
    base: Base,
    finished: FinishedArtifact,
    note: Callable[[str], None],
) -> list[dict[str, Any]]:
    """The reports of the other artifacts in the repository, which must be of the same model."""
    reports = []
    for path in sorted(state.files):
        found = _REPORTS.fullmatch(path)
        if found is None or found[1] == stem:
            continue
        report = _read_report(repository, state, path)
        if any(file["path"] not in state.files for file in report["artifact"]["files"]):
            note(f"{path} is of a file that is no longer there: the card leaves it out")
            continue
        ours, theirs = base.model_id or finished.report["model"], report["base_model"] or report["model"]
        if ours != theirs:
            raise ConvertError(
                f"the repository holds quantizations of {theirs}, and this is one of {ours}",
                f"{repository.name}: {path}",
                "publish to a repository of its own; where both are the same model, name it with --base-model",
            )
        reports.append(report)
    return reports


def _read_report(repository: HubRepository, state: RepositoryState, path: str) -> dict[str, Any]:
    """A report that was published before, with all that the card needs of it."""
    content = _fetch(repository, state, path, LARGEST_METADATA_BYTES)
    try:
        report = json.loads(content)
        model_card.section(repository.name, report["base_model"], [report], chat_template=True)
    except _NO_REPORT as error:
        raise UnreadableReport(
            f"a report in the repository cannot be read: {type(error).__name__} {error}",
            f"{repository.name}: {path}",
            "publish that artifact again with --replace, or delete the file on the Hub",
        ) from None
    return report


def _fetch(repository: HubRepository, state: RepositoryState, path: str, limit: int) -> bytes:
    """A file of the repository. Raises ConvertError for more than `limit` bytes."""
    if (size := state.files[path].n_bytes) > limit:
        raise ConvertError(
            f"the file has {size} bytes, and {limit} are the most for its kind",
            f"{repository.name}: {path}",
            "delete it on the Hub, or publish to another repository",
        )
    return repository.read(path, state.commit)


def _obsolete(
    repository: HubRepository,
    state: RepositoryState,
    stem: str,
    report: dict[str, Any],
    files: list[RepositoryFile],
    target: Target,
) -> list[str]:
    """Files that an earlier state of this artifact left and the new one lacks. Refuses to replace another artifact."""
    path = f"{RECIPES}/{stem}/{REPORT}"
    earlier = None
    if path in state.files:
        try:
            earlier = _read_report(repository, state, path)
        except UnreadableReport:
            if not target.replace:
                raise
    weights = {file["path"] for file in report["artifact"]["files"]}
    taken = [f for f in files if f.path in weights and f.path in state.files and not state.files[f.path].same_as(f)]
    is_other = _identity(earlier) != _identity(report) if earlier is not None else bool(taken)
    if is_other and not target.replace:
        theirs = f"profile {earlier['profile']}" if earlier is not None else "published by other means"
        raise ConvertError(
            f"the repository has another artifact of this name ({theirs})",
            f"{repository.name}: {stem}.gguf",
            "give this one another name (convert publish ... --name), or put it in the other's place (--replace)",
        )
    kept = {file.path for file in files}
    return sorted(name for name in _written(state, stem, earlier) if name not in kept)


def _written(state: RepositoryState, stem: str, earlier: dict[str, Any] | None) -> set[str]:
    """Of the repository's files those that an earlier publishing wrote for this artifact: weights by their names and
    hashes, and in the directory of its recipe what goes there. A report may name anything; what else it names stays."""
    beside = {*RECIPE_NAMES}
    if earlier is not None:
        beside |= {profile_file(earlier["profile"]), *(earlier[key]["file"] for key in MEASURED if earlier[key])}
    mine = {f"{RECIPES}/{stem}/{name}" for name in beside} & state.files.keys()
    for file in earlier["artifact"]["files"] if earlier is not None else []:
        there = state.files.get(file["path"])
        ours = re.fullmatch(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.gguf", file["path"])
        if ours and there is not None and there.sha256 == file["sha256"]:
            mine.add(file["path"])
    return mine


def _identity(report: dict[str, Any]) -> list[Any]:
    """What makes an artifact another one, not a newer state of the same."""
    return [report["recipe"].get(key) for key in ("plan_sha256", "profile", "overrides", "source.model")]


def _check_arrival(repository: HubRepository, change: Change) -> None:
    """The repository holds what was sent: a .gitignore in it may have left files out without a word."""
    state = _existing(repository)
    for file in change.sent:
        if file.path not in state.files or not state.files[file.path].same_as(file):
            raise ConvertError(
                "the commit was made, but this file is not in it as it was sent",
                f"{repository.name}: {file.path}",
                "look for a .gitignore in the repository that names it, then run the same command again",
            )


def _result(
    repository: HubRepository,
    target: Target,
    state: RepositoryState | None,
    change: Change,
    commit: str | None,
    notes: list[str],
) -> dict[str, Any]:
    """What the repository holds, as plain data: every file, and what becomes of it."""
    present = state.files if state is not None else {}
    sent = {file.path for file in change.sent}
    rows: list[dict[str, Any]] = [
        {
            "path": file.path,
            "bytes": file.n_bytes,
            "sha256": file.sha256,
            "change": "same" if file.path not in sent else "new" if file.path not in present else "changed",
        }
        for file in change.files
    ]
    ours = {row["path"] for row in rows}
    for path, remote in sorted(present.items()):
        if path not in ours:
            change_of_it = "deleted" if path in change.deleted else "kept"
            rows.append({"path": path, "bytes": remote.n_bytes, "sha256": remote.sha256, "change": change_of_it})
    return {
        "repository": repository.name,
        "url": repository.url,
        "exists": state is not None,
        "private": state.private if state is not None else not target.public,
        "commit": commit,
        "files": rows,
        "card": change.card,
        "notes": notes,
    }


def result_text(result: dict[str, Any]) -> str:
    """The repository for people."""
    from converter.report import table

    done = result["commit"] is not None
    rows = [
        [row["path"], str(row["bytes"]), (row["sha256"] or "")[:16], _WORDS[done][row["change"]]]
        for row in result["files"]
    ]
    sent = sum(row["bytes"] for row in result["files"] if row["change"] in ("new", "changed"))
    visibility = "private" if result["private"] else "public"
    lines = [table(["file", "bytes", "sha256", ""], rows), ""]
    if done:
        return "\n".join([*lines, f"published    {result['url']} ({visibility}), commit {result['commit']}"])
    verb = "change" if result["exists"] else "create"
    lines.append(f"would {verb} {result['url']} ({visibility}) and send {sent} bytes; nothing was written")
    return "\n".join([*lines, "", "README.md would be:", "", result["card"].rstrip()])


_WORDS = {
    True: {"new": "sent", "changed": "sent", "same": "there already", "kept": "untouched", "deleted": "deleted"},
    False: {
        "new": "to send",
        "changed": "to send",
        "same": "there already",
        "kept": "untouched",
        "deleted": "to delete",
    },
}
