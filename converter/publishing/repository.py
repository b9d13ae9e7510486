"""A model repository on the Hub that is written to: rights first, large files one by one, then all in one commit.

huggingface_hub does the transfer, over xet where the server has it and git LFS where not. What the storage has already,
by hash, it does not send again; so a call that was interrupted continues. The repository changes only with the commit.
"""

import hashlib
import io
import re
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar
from urllib.parse import quote

from bitwright.converter.publishing.failures import http_error, pause, status_of
from bitwright.converter.publishing.rights import (
    LOG_IN,
    check_repository_name,
    why_not_creatable,
    why_read_only,
    with_known_owner,
)
from bitwright.converter.source.hub import first_line
from bitwright.formats.errors import ConvertError, TryAgain

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

_ATTEMPTS = 6
_LONGEST_WAIT_SECONDS = 900.0
_SMALL_FILE_BYTES = 1_000_000
T = TypeVar("T")


class Unreachable(TryAgain):
    """There is no way to the Hub, or it is switched off."""


class Changed(Exception):
    """The repository is no longer at the commit that the upload was decided on."""


@dataclass(frozen=True)
class RepositoryFile:
    """A file as it is to be in the repository; content: where it lies, or its bytes; sha256: of the content, hex."""

    path: str
    content: Path | bytes
    n_bytes: int
    sha256: str

    @classmethod
    def of_bytes(cls, path: str, content: bytes) -> "RepositoryFile":
        return cls(path, content, len(content), hashlib.sha256(content).hexdigest())

    def open(self) -> BinaryIO:
        return io.BytesIO(self.content) if isinstance(self.content, bytes) else self.content.open("rb")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. sha256: of a large file's content; git_hash: of a small one's, as git counts it."""

    n_bytes: int
    sha256: str | None
    git_hash: str

    def same_as(self, file: RepositoryFile) -> bool:
        if self.sha256 is not None:
            return self.sha256 == file.sha256
        if self.n_bytes != file.n_bytes:
            return False
        with file.open() as opened:
            blob = b"blob %d\0" % file.n_bytes + opened.read()
        return self.git_hash == hashlib.sha1(blob, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class RepositoryState:
    """A repository at one commit."""

    private: bool
    commit: str
    files: dict[str, RemoteFile]


class HubRepository:
    """name: org/name. say: told, a line each, what is waited for. token: None reads what is public. patient: try again
    what fails for a while."""

    def __init__(self, name: str, say: Callable[[str], None], token: str | None, patient: bool = True):
        from huggingface_hub import HfApi

        check_repository_name(name, "--to")
        self.name, self.token, self.say = name, token, say
        self._attempts = _ATTEMPTS if patient else 1
        self._api = HfApi(token=token or False)

    @property
    def url(self) -> str:
        return f"{self._api.endpoint}/{self.name}"

    def check_rights(self) -> RepositoryState | None:
        """The repository's state, None where it does not exist yet. Raises ConvertError for a token that is absent or
        invalid, and for one that may not write to this repository or not create it."""
        if self.token is None:
            raise ConvertError(
                "there is no token for the Hub",
                "HF_TOKEN, or a stored login",
                f"log in with one that may write: {LOG_IN}",
            )
        identity = self._ask(lambda: self._api.whoami(token=self.token))
        self.name = with_known_owner(identity, self.name)
        state, why_not = None, why_read_only(identity)
        if why_not is None:
            state = self.state()
            why_not = self._ask(self._why_not_writable) if state else why_not_creatable(identity, self.name)
        if why_not is not None:
            owner, _, name = self.name.partition("/")
            raise ConvertError(
                f"the token of {identity.get('name')} cannot publish here: {why_not}",
                self.name,
                f"use a token with write access to {owner}: {LOG_IN} --force;"
                f" or publish under a name of yours: {identity.get('name')}/{name}",
            )
        return state

    def _why_not_writable(self) -> str | None:
        from huggingface_hub import errors

        try:
            self._api.auth_check(self.name, write=True)
        except errors.HfHubHTTPError as error:
            if error.response.status_code not in (401, 403, 404):
                raise
            return f"the repository exists, and the Hub refuses writing to it ({first_line(error)})"
        return None

    def state(self) -> RepositoryState | None:
        """The repository as it is now; None where there is none that this token can see."""
        from huggingface_hub import errors
        from huggingface_hub.hf_api import RepoFile

        def look() -> RepositoryState | None:
            try:
                info = self._api.repo_info(self.name)
            except errors.RepositoryNotFoundError:
                return None
            files = {}
            for entry in self._api.list_repo_tree(self.name, recursive=True, revision=info.sha):
                if isinstance(entry, RepoFile):
                    sha256 = entry.lfs.sha256 if entry.lfs else None
                    files[entry.path] = RemoteFile(entry.size, sha256, entry.blob_id)
            self.name = info.id  # as the Hub spells it, and where a renamed one is now
            return RepositoryState(bool(info.private), str(info.sha), files)

        return self._ask(look)

    def read(self, path: str, commit: str) -> bytes:
        """A small file's content."""
        return self._ask(partial(self._get, f"{self.url}/resolve/{commit}/{quote(path)}"))

    def _get(self, url: str) -> bytes:
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        response = get_session().get(url, headers=build_hf_headers(token=self.token or False))
        hf_raise_for_status(response)
        return response.content

    def model(self, model_id: str) -> tuple[str, dict[str, Any]] | None:
        """(the id of a model on the Hub in the letters that the Hub writes it with, its card's data); None where the
        Hub has no such model."""
        from huggingface_hub import errors

        def look() -> tuple[str, dict[str, Any]] | None:
            try:
                info = self._api.model_info(model_id)
            except errors.RepositoryNotFoundError:
                return None
            card: Any = info.card_data
            task = {"pipeline_tag": info.pipeline_tag} if info.pipeline_tag else {}
            return info.id, {**task, **(card.to_dict() if card else {})}

        return self._ask(look)

    def create(self, public: bool) -> None:
        self._ask(lambda: self._api.create_repo(self.name, private=not public, exist_ok=True))

    def upload(
        self, files: Sequence[RepositoryFile], deleted: Sequence[str], state: RepositoryState, message: str
    ) -> str:
        """Send these files and commit them on top of the state; returns the commit.

        Raises Changed when somebody has committed since, ConvertError for everything else. What was sent stays in the
        storage, and is not sent again.
        """
        from huggingface_hub import CommitOperationDelete

        additions = self._ask(lambda: [_addition(file) for file in files])
        over_lfs = not self._ask(self._has_xet)
        small = []
        for file, addition in zip(files, additions, strict=True):
            if file.n_bytes <= _SMALL_FILE_BYTES:
                small.append(addition)
                continue
            self.say(f"sending {file.path}, {file.n_bytes} bytes")
            self._ask(partial(self._send, [addition], over_lfs))
        self.say(f"sending {len(small)} small files and the commit")
        self._ask(partial(self._send, small, over_lfs))
        operations: list[Any] = [*additions, *map(CommitOperationDelete, deleted)]
        commit = self._ask(
            lambda: self._api.create_commit(self.name, operations, commit_message=message, parent_commit=state.commit)
        )
        return commit.oid

    def _has_xet(self) -> bool:
        from huggingface_hub import errors

        try:
            self._get(f"{self._api.endpoint}/api/models/{self.name}/xet-write-token/main")
        except errors.HfHubHTTPError as error:
            if error.response.status_code != 404:
                raise
            return False
        return True

    def _send(self, additions: "Sequence[CommitOperationAdd]", over_lfs: bool) -> None:
        """Put what is large among these files into the storage.

        over_lfs: huggingface_hub sends open files over git LFS, and expects xet for all others. They are opened for
        this attempt alone: one that fails leaves them read to somewhere.
        """
        with ExitStack() as opened:
            for addition in additions if over_lfs else ():
                opened.callback(setattr, addition, "path_or_fileobj", addition.path_or_fileobj)
                addition.path_or_fileobj = opened.enter_context(addition.as_file())
            self._api.preupload_lfs_files(self.name, list(additions), free_memory=False)

    def _ask(self, call: Callable[[], T]) -> T:
        """The call's result; tried again, with growing pauses or those that the server asks for, while the failure is
        one that passes. Raises ConvertError, or Changed."""
        from huggingface_hub import errors

        for attempt in range(self._attempts):
            try:
                return call()
            except errors.OfflineModeIsEnabled:
                raise Unreachable(
                    "the Hub is switched off (HF_HUB_OFFLINE)", self.name, "unset HF_HUB_OFFLINE, then try again"
                ) from None
            except (errors.HTTPError, OSError, RuntimeError, ValueError) as error:
                seconds = pause(http_error(error), attempt)
                if seconds is None or attempt + 1 == self._attempts or seconds > _LONGEST_WAIT_SECONDS:
                    raise self._failure(error, seconds) from None
                self.say(f"the Hub: {self._message(error)}; trying again in {seconds:.0f} s")
            time.sleep(seconds)
        raise AssertionError("the last attempt returns or raises")

    def _failure(self, error: Exception, seconds: float | None) -> Exception:
        status, message = status_of(http_error(error)), self._message(error)
        if status == 412:
            return Changed(message)
        remedy = "run the same command again: what has arrived is not sent again"
        if status is None and seconds is not None:
            return Unreachable(f"the Hub does not answer ({message})", self._api.endpoint, remedy)
        if status in (401, 403):
            remedy = f"check the token and its rights: hf auth whoami; {LOG_IN} --force"
        elif status == 400 or isinstance(error, ValueError):
            remedy = "correct what the Hub names, then run the same command again"
        elif seconds is not None and seconds > _LONGEST_WAIT_SECONDS:
            remedy = f"run the same command again in {seconds / 60:.0f} minutes: the Hub asks for that pause"
        return ConvertError(f"the Hub did not take it ({message})", self.name, remedy)

    def _message(self, error: Exception) -> str:
        """What an error and the failed request behind it say in one line, without the token, and without queries of
        addresses, which may be signed."""
        own, cause = (" ".join(str(link).split()) or type(link).__name__ for link in (error, http_error(error)))
        text = own if cause in own else f"{own} {cause}"
        if self.token:
            text = text.replace(self.token, "<token>")
        return re.sub(r"(https?://[^\s'\"?]+)\?[^\s'\"]*", r"\1", text)


def _addition(file: RepositoryFile) -> "CommitOperationAdd":
    """The file's part of a commit. Raises ValueError for a path that no repository may have, OSError for a file that is
    gone; reads no file as a whole."""
    from huggingface_hub import CommitOperationAdd

    addition = CommitOperationAdd(file.path, file.content)
    addition.upload_info.sha256 = bytes.fromhex(file.sha256)  # else it is computed of every byte
    return addition
