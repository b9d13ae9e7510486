"""The stage `publish`: an artifact, what made it and a card about it into a model repository on the Hub."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright.converter.job.progress import Progress
from bitwright.converter.publishing.bundle import LARGEST_FILE_BYTES, FinishedArtifact, load_artifact, repository_stem
from bitwright.converter.publishing.change import Base, Change, Publication
from bitwright.converter.publishing.outcome import outcome
from bitwright.converter.publishing.repository import Changed, HubRepository, RepositoryState, Unreachable
from bitwright.converter.publishing.rights import LOG_IN, check_repository_name, stored_token
from bitwright.formats.errors import ConvertError, TryAgain

# How often somebody else may change the repository while we publish.
_ROUNDS = 4


@dataclass(frozen=True)
class Target:
    """Where and how to publish.

    repository: org/name. public: make a new repository public, and agree to write to a public one. base_model: the
    source's id on the Hub, where the artifact does not know it. name: of a GGUF in the repository. replace: put the
    artifact in the place of another one that has its name.
    """

    repository: str
    public: bool = False
    base_model: str | None = None
    name: str | None = None
    replace: bool = False


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
    location: Path, target: Target, progress: Progress, *, work_dir: Path | None = None, dry_run: bool = False
) -> dict[str, Any]:
    """Publish the artifact that begins with this file, or is this directory; returns what the repository holds then.

    dry_run: change nothing; without a login or a network the repository is taken for a new one. Raises ConvertError;
    the same call again continues, and one after the last finds nothing to do.
    """
    check_repository_name(target.repository, "--to")
    notes: list[str] = []

    def note(text: str) -> None:
        if text not in notes:
            notes.append(text)
            progress.say(text)

    repository = HubRepository(target.repository, progress.say, stored_token(), patient=not dry_run)
    if not dry_run:
        repository.check_rights()  # before every byte of the artifact is read
    artifact = load_artifact(location, work_dir, progress)
    state, base = _look(repository, target, artifact, note, dry_run)
    stem = repository_stem(artifact, target.name)
    if not artifact.is_directory and stem not in artifact.location.name:
        note(f"in the repository the artifact is called {stem}.gguf, by the GGUF naming convention")
    for text in artifact.notes:
        note(text)
    publication = Publication(repository, artifact, base, stem, target.replace, note)
    for _ in range(_ROUNDS):
        change, commit = publication.change(state), None
        if not dry_run and state is not None:
            commit = _commit(repository, state, change, progress, f"Publish {stem}")
        if dry_run or commit is not None:
            return outcome(repository, not target.public, state, change, commit, notes)
        if state is None:
            repository.create(target.public)
        state = _existing(repository)
    raise TryAgain(
        "somebody else keeps changing the repository", target.repository, "run the same command again when that is done"
    )


def _commit(
    repository: HubRepository, state: RepositoryState, change: Change, progress: Progress, message: str
) -> str | None:
    """The commit that has the change, the state's own where nothing changes; None where the repository is no longer at
    this state. Raises ConvertError for a file that did not arrive: a .gitignore may leave it out without a word."""
    if not change.sent and not change.deleted:
        progress.say("already there: every file has the hash that it would be sent with")
        return state.commit
    try:
        commit = repository.upload(change.sent, change.deleted, state, message)
    except Changed:
        progress.say("the repository has changed meanwhile: looking again")
        return None
    present = _existing(repository).files
    for file in change.sent:
        if file.path not in present or not present[file.path].same_as(file):
            raise ConvertError(
                "the commit was made, but this file is not in it as it was sent",
                f"{repository.name}: {file.path}",
                "look for a .gitignore in the repository that names it, then run the same command again",
            )
    return commit


def _look(
    repository: HubRepository, target: Target, artifact: FinishedArtifact, note: Callable[[str], None], dry_run: bool
) -> tuple[RepositoryState | None, Base]:
    """The repository and the base model as they are on the Hub. A dry run needs no rights, and not even a Hub."""
    try:
        state = repository.state() if dry_run else repository.check_rights()
        _check_visibility(target, state, note)
        if state is None and repository.token is None:
            note("not logged in: shown as for a new repository")
        return state, _base(repository, target, artifact, note)
    except Unreachable as error:
        if not dry_run:
            raise
        note(f"{error.what}: shown as for a new repository, with the base model as it was given")
        return None, Base(target.base_model or artifact.model_id, artifact.report.source.card)


def _existing(repository: HubRepository) -> RepositoryState:
    state = repository.state()
    if state is None:
        raise ConvertError(
            "the repository is there, but this token may not see it",
            repository.name,
            f"use a token with access to it: {LOG_IN} --force; or another name",
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


def _base(repository: HubRepository, target: Target, artifact: FinishedArtifact, note: Callable[[str], None]) -> Base:
    """The base model with the spelling and the card that the Hub has, or what the report knows."""
    model_id = target.base_model or artifact.model_id
    if model_id is None:
        note("the source is a local checkpoint: the card names no base_model; give it with --base-model org/name")
        return Base(None, artifact.report.source.card)
    base = _find_base(repository, model_id, required=target.base_model is not None)
    if base is None:
        note(f"the Hub does not show {model_id} (private, or gone): the card names it as it was opened")
        return Base(model_id, artifact.report.source.card)
    return Base(base.model_id, {**artifact.report.source.card, **base.card})


def _find_base(repository: HubRepository, model_id: str, required: bool) -> Base | None:
    """A model on the Hub; where it is not there, None, or an error for a required one."""
    check_repository_name(model_id, "--base-model")
    found = repository.model(model_id)
    if found is None and required:
        raise ConvertError(
            "the Hub has no such model, or this token may not see it", f"--base-model {model_id}", "check the id"
        )
    return Base(*found) if found else None
