"""A model repository on the Hub that is written to: rights first, large files one by one, then all in one commit.

huggingface_hub does the transfer, over xet where the server has it and git LFS where not. What the storage has already,
by hash, it does not send again; so a call that was interrupted continues. The repository changes only with the commit.
"""

import hashlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from converter.hub import first_line
from formats.errors import ConvertError

LOG_IN = "hf auth login"
_ATTEMPTS = 6
_LONGEST_WAIT_SECONDS = 900.0
_SMALL_FILE_BYTES = 1_000_000
_TRANSIENT = (408, 429, 500, 502, 503, 504)
# The roles in an organization under which its repositories can be made.
_WRITING_ROLES = ("admin", "write", "contributor")
T = TypeVar("T")


class Unreachable(ConvertError):
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

    def git_hash(self) -> str:
        content = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. sha256: of a large file's content; git_hash: of a small one's, as git counts it."""

    n_bytes: int
    sha256: str | None
    git_hash: str

    def same_as(self, file: RepositoryFile) -> bool:
        if self.sha256 is not None:
            return self.sha256 == file.sha256
        return self.n_bytes == file.n_bytes and self.git_hash == file.git_hash()


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
        self.name = _with_known_owner(identity, self.name)
        why_not = _why_read_only(identity)
        state = None if why_not else self.state()
        if why_not is None:
            why_not = self._why_not_writable() if state else _why_not_creatable(identity, self.name)
        if why_not is not None:
            raise ConvertError(
                f"the token of {identity.get('name')} cannot publish here: {why_not}",
                self.name,
                f"use a token with write access to {self.name.partition('/')[0]}: {LOG_IN} --force;"
                f" or publish under a name of yours: {identity.get('name')}/{self.name.partition('/')[2]}",
            )
        return state

    def _why_not_writable(self) -> str | None:
        from huggingface_hub import errors

        def check() -> str | None:
            try:
                self._api.auth_check(self.name, write=True)
            except errors.HfHubHTTPError as error:
                if error.response.status_code in (401, 403, 404):
                    return f"the repository exists, and the Hub refuses writing to it ({first_line(error)})"
                raise
            return None

        return self._ask(check)

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
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        def fetch() -> bytes:
            url = f"{self.url}/resolve/{commit}/{quote(path)}"
            response = get_session().get(
                url, headers=build_hf_headers(token=self.token or False), follow_redirects=True
            )
            hf_raise_for_status(response)
            return response.content

        return self._ask(fetch)

    def model(self, model_id: str) -> tuple[str, dict[str, Any]] | None:
        """(the id of a model on the Hub in the letters that the Hub writes it with, its card's data); None where the
        Hub has no such model."""
        from huggingface_hub import errors

        def look() -> tuple[str, dict[str, Any]] | None:
            try:
                info = self._api.model_info(model_id)
            except errors.RepositoryNotFoundError:
                return None
            card = info.card_data.to_dict() if info.card_data else {}
            return info.id, {**({"pipeline_tag": info.pipeline_tag} if info.pipeline_tag else {}), **card}

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
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        additions = []
        for file in files:
            addition = CommitOperationAdd(file.path, file.content)
            addition.upload_info.sha256 = bytes.fromhex(file.sha256)  # known already, and terabytes take their time
            additions.append(addition)
        operations: list[Any] = [*additions, *map(CommitOperationDelete, deleted)]
        with self._quiet_client(), self._transport():
            small = []
            for file, addition in zip(files, additions, strict=True):
                if file.n_bytes <= _SMALL_FILE_BYTES:
                    small.append(addition)
                    continue
                self.say(f"sending {file.path}, {file.n_bytes} bytes")
                self._ask(partial(self._api.preupload_lfs_files, self.name, [addition], free_memory=False))
            self.say(f"sending {len(small)} small files and the commit")
            self._ask(partial(self._api.preupload_lfs_files, self.name, small, free_memory=False))
            commit = self._ask(
                lambda: self._api.create_commit(
                    self.name, operations, commit_message=message, parent_commit=state.commit
                )
            )
        return commit.oid

    @contextmanager
    def _transport(self) -> Iterator[None]:
        """Switch to git LFS for a server without xet, which huggingface_hub does not try by itself."""
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        def has_xet() -> bool:
            url = f"{self._api.endpoint}/api/models/{self.name}/xet-write-token/main"
            response = get_session().get(url, headers=build_hf_headers(token=self.token))
            if response.status_code == 404:
                return False
            hf_raise_for_status(response)
            return True

        switched_off = constants.HF_HUB_DISABLE_XET
        constants.HF_HUB_DISABLE_XET = switched_off or not self._ask(has_xet)
        try:
            yield
        finally:
            constants.HF_HUB_DISABLE_XET = switched_off

    @contextmanager
    def _quiet_client(self) -> Iterator[None]:
        """huggingface_hub's bars on a terminal only, and its messages without tokens and signatures."""
        import logging
        import sys

        from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

        def redact(record: logging.LogRecord) -> bool:
            record.msg, record.args = self._redacted(record.getMessage()), None
            return True

        handlers = logging.getLogger("huggingface_hub").handlers
        hide_bars = not sys.stderr.isatty() and not are_progress_bars_disabled()
        for handler in handlers:
            handler.addFilter(redact)
        if hide_bars:
            disable_progress_bars()
        try:
            yield
        finally:
            for handler in handlers:
                handler.removeFilter(redact)
            if hide_bars:
                enable_progress_bars()

    def _redacted(self, text: str) -> str:
        """Without the token, and without the query of an address, which may be a signature."""
        if self.token:
            text = text.replace(self.token, "<token>")
        return re.sub(r"(https?://[^\s'\"?]+)\?[^\s'\"]*", r"\1", text)

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
                seconds = _pause(error, attempt)
                if seconds is None or attempt + 1 == self._attempts or seconds > _LONGEST_WAIT_SECONDS:
                    raise self._failure(error, seconds) from None
                self.say(f"the Hub: {self._redacted(_message(error))}; trying again in {seconds:.0f} s")
            time.sleep(seconds)
        raise AssertionError("the last attempt returns or raises")

    def _failure(self, error: Exception, seconds: float | None) -> Exception:
        from huggingface_hub.errors import HTTPError

        status = _status(error)
        message = self._redacted(_message(error))
        if status == 412:
            return Changed(message)
        remedy = "run the same command again: what has arrived is not sent again"
        if status is None and any(isinstance(link, HTTPError) for link in _chain(error)):
            return Unreachable(f"the Hub does not answer ({message})", self._api.endpoint, remedy)
        if status in (401, 403):
            remedy = f"check the token and its rights: hf auth whoami; {LOG_IN} --force"
        elif status == 400 or isinstance(error, ValueError):
            remedy = "correct what the Hub names, then run the same command again"
        elif seconds is not None and seconds > _LONGEST_WAIT_SECONDS:
            remedy = f"run the same command again in {seconds / 60:.0f} minutes: the Hub asks for that pause"
        return ConvertError(f"the Hub did not take it ({message})", self.name, remedy)


def stored_token() -> str | None:
    """The token of the environment or of `hf auth login`. Raises ConvertError for one that cannot be sent."""
    from huggingface_hub import get_token

    token = get_token()
    if token is not None and not re.fullmatch(r"[\x21-\x7e]+", token):
        raise ConvertError(
            "the token for the Hub has characters that no token has",
            "HF_TOKEN, or the stored login",
            f"{LOG_IN} --force",
        )
    return token


def check_repository_name(name: str, where: str) -> None:
    """Raises ConvertError for what cannot be the name of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        reason = None if "/" in name else "it has no owner"
    except HFValidationError as error:
        reason = first_line(error)
    if reason is not None:
        raise ConvertError(f"{name!r} is no name of a repository: {reason}", where, "write org/name, or user/name")


def _with_known_owner(identity: dict[str, Any], name: str) -> str:
    """The repository's name with its owner in the letters that the Hub writes it with."""
    owner, _, rest = name.partition("/")
    known = {str(entry.get("name")).casefold(): entry["name"] for entry in (identity, *identity.get("orgs", []))}
    return f"{known.get(owner.casefold(), owner)}/{rest}"


def _why_read_only(identity: dict[str, Any]) -> str | None:
    token = identity.get("auth", {}).get("accessToken", {})
    return "it may only read" if token.get("role") == "read" else None


def _why_not_creatable(identity: dict[str, Any], name: str) -> str | None:
    """Why a token with this whoami may not create the repository; None where nothing is known against it."""
    namespace, token = name.partition("/")[0].casefold(), identity.get("auth", {}).get("accessToken", {})
    if token.get("role") == "fineGrained":
        for scope in token.get("fineGrained", {}).get("scoped", []):
            entity = scope.get("entity", {})
            if str(entity.get("name", "")).casefold() == namespace and "repo.write" in scope.get("permissions", []):
                return None
        return (
            f"it is fine-grained, and writing to the repositories of {name.partition('/')[0]} is not among its scopes"
        )
    if namespace == str(identity.get("name", "")).casefold():
        return None
    roles = {str(org.get("name", "")).casefold(): org.get("roleInOrg") for org in identity.get("orgs", [])}
    if namespace not in roles:
        return f"{identity.get('name')} is no member of {name.partition('/')[0]}"
    if roles[namespace] not in (None, *_WRITING_ROLES):
        return f"the role of {identity.get('name')} in {name.partition('/')[0]} is {roles[namespace]!r}"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _message(error: BaseException) -> str:
    """What an error says in one line, with what its causes say."""
    own = " ".join(str(error).split()) or type(error).__name__
    cause = "" if error.__cause__ is None or isinstance(error, OSError) else _message(error.__cause__)
    return own if cause in own else f"{own} {cause}"


def _status(error: Exception) -> int | None:
    """The HTTP status behind an error, through the wrappers that the client puts around it."""
    for link in _chain(error):
        if (response := getattr(link, "response", None)) is not None:
            return response.status_code
    return None


def _pause(error: Exception, attempt: int) -> float | None:
    """Seconds to wait before another attempt; None when another one would end alike."""
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import parse_ratelimit_headers

    for link in _chain(error):
        if (response := getattr(link, "response", None)) is not None:
            if response.status_code not in _TRANSIENT:
                return None
            limit = parse_ratelimit_headers(response.headers)
            if limit is not None and limit.remaining == 0:
                return limit.reset_in_seconds + 1.0
            asked = _seconds(response.headers.get("Retry-After"))
            return 2.0**attempt if asked is None else asked
        if isinstance(link, HTTPError):  # without a response: the connection was refused, cut or timed out
            return 2.0**attempt
    return None


def _seconds(retry_after: str | None) -> float | None:
    """A Retry-After header, seconds or a date, as seconds from now."""
    if retry_after is None:
        return None
    if retry_after.strip().isdigit():
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return None
