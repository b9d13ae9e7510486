"""A Hub on this machine that can be written to: the part of the Hub's API that huggingface_hub publishes with.

Accounts and their tokens, repositories with commits, git LFS (single and multipart) with storage behind signed
addresses, and what goes wrong on the way: answers of 429 and 503, connections cut, answers lost. What arrives is
checked: hashes of stored objects, parents of commits, objects that a commit names but nobody sent.
"""

import base64
import hashlib
import json
import re
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import RLock, Thread
from typing import Any
from urllib.parse import unquote

import yaml

SIGNATURE = "X-Amz-Signature=5ec4e7516na7u4e"
LICENSES = ("apache-2.0", "mit", "llama3.2", "other")
# How often the server looks whether it is to end, which whoever ends it waits for.
_POLL_SECONDS = 0.01


@dataclass(frozen=True)
class Account:
    """A token's owner. role: of the token, "read", "write" or "fineGrained". scopes: of a fine-grained token,
    (entity type, entity name, permission). organizations: name -> role in it."""

    name: str
    role: str = "write"
    scopes: tuple[tuple[str, str, str], ...] = ()
    organizations: dict[str, str] = field(default_factory=dict)

    def whoami(self) -> dict[str, Any]:
        token: dict[str, Any] = {"displayName": "test", "role": self.role}
        if self.role == "fineGrained":
            token["fineGrained"] = {
                "global": [],
                "scoped": [
                    {"entity": {"type": kind, "name": name}, "permissions": ["repo.content.read", permission]}
                    for kind, name, permission in self.scopes
                ],
            }
        return {
            "type": "user",
            "name": self.name,
            "orgs": [{"type": "org", "name": name, "roleInOrg": role} for name, role in self.organizations.items()],
            "auth": {"type": "access_token", "accessToken": token},
        }

    def may_write(self, repository: str) -> bool:
        namespace = repository.partition("/")[0]
        if self.role == "fineGrained":
            return any(
                permission == "repo.write" and name in (namespace, repository) for _, name, permission in self.scopes
            )
        member = namespace == self.name or self.organizations.get(namespace) in ("admin", "write", "contributor")
        return member and self.role == "write"


@dataclass
class Repository:
    """files: of every commit, path -> content; the bytes of large ones are in the Hub's storage, under their hash."""

    name: str
    private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    card: dict[str, Any] | None = None

    def commit(self, files: dict[str, bytes]) -> str:
        seed = json.dumps([len(self.commits), sorted((p, hashlib.sha256(c).hexdigest()) for p, c in files.items())])
        self.commits.append((hashlib.sha1(seed.encode()).hexdigest(), files))
        return self.commits[-1][0]

    def files(self, revision: str) -> dict[str, bytes] | None:
        if revision == "main":
            return self.commits[-1][1]
        return dict(self.commits).get(revision)


@dataclass
class Fault:
    """What happens to the next `times` requests that match, a text "METHOD /path": an answer with this status, or the
    connection closed in the middle of the request ("cut") or after the work is done ("lost")."""

    pattern: str
    what: int | str
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1


class WritableHub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, accounts: dict[str, Account], part_bytes: int = 1 << 30):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.accounts, self.part_bytes = accounts, part_bytes
        self.repositories: dict[str, Repository] = {}
        self.storage: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.stored_bytes: Counter[str] = Counter()  # bytes of bodies that reached the storage, by object
        # Of a Hub with xet: the address of its storage, and what is in it by SHA-256 once it has been sent there.
        self.xet: tuple[str, dict[str, bytes]] | None = None
        self.on_stored: Callable[[str], None] = lambda oid: None
        self.lock = RLock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(
        self, name: str, private: bool = False, files: dict[str, bytes] | None = None, **options: Any
    ) -> Repository:
        self.repositories[name] = Repository(name, private, **options)
        self.repositories[name].commit(
            {".gitattributes": b"*.gguf filter=lfs diff=lfs merge=lfs -text\n", **(files or {})}
        )
        return self.repositories[name]

    def add_directory(self, name: str, directory: Path, **options: Any) -> Repository:
        return self.add(name, files={path.name: path.read_bytes() for path in directory.iterdir()}, **options)

    def files(self, name: str) -> dict[str, bytes]:
        return {path: data for path, data in self.repositories[name].files("main").items() if path != ".gitattributes"}

    def writes(self) -> list[str]:
        """The requests that change anything."""
        asking = ("preupload", "objects/batch", "validate-yaml")
        return [r for r in self.requests if not r.startswith(("GET", "HEAD")) and not any(part in r for part in asking)]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that either side has closed is part of the game."""


class _Handler(BaseHTTPRequestHandler):
    server: WritableHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or an answer waits 40 ms for the acknowledgement of its headers

    def log_message(self, *_: object) -> None:
        pass

    def handle_one_method(self) -> None:
        path, _, self.query = self.path.partition("?")
        self.resource = unquote(path)
        request = f"{self.command} {self.resource}"
        self.server.requests.append(request)
        fault = next((f for f in self.server.faults if f.times and re.search(f.pattern, request)), None)
        if fault is not None:
            fault.times -= 1
            if fault.what == "cut":
                self.rfile.read(min(1000, int(self.headers.get("Content-Length", 0)) // 2))
                return self.hang_up()
        self.body = self.read_body()
        if fault is not None and isinstance(fault.what, int):
            return self.answer(fault.what, {"error": "not now"}, fault.headers)
        self.lost = fault is not None
        with self.server.lock:
            self.route()

    do_GET = do_HEAD = do_POST = do_PUT = handle_one_method

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def hang_up(self) -> None:
        """Reset the connection, as a router that loses it does."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def answer(self, status: int, body: object = None, headers: dict[str, str] | None = None) -> None:
        if getattr(self, "lost", False):
            return self.hang_up()
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/octet-stream" if isinstance(body, bytes) else "application/json")
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    @property
    def account(self) -> Account | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return self.server.accounts.get(token)

    def route(self) -> None:
        if self.resource.startswith("/storage/"):
            return self.store()
        if self.headers.get("Authorization") and self.account is None:
            message = "Invalid credentials in Authorization header"
            return self.answer(401, {"error": message}, {"X-Error-Message": message})
        if respond := _FIXED.get(self.resource):
            return respond(self)
        for pattern, respond in _ROUTES:
            if match := re.fullmatch(pattern, self.resource):
                return self.with_repository(match["repository"], respond, match.groupdict())
        return self.answer(404, {"error": f"no such address: {self.resource}"})

    def whoami(self) -> None:
        self.answer(200, self.account.whoami()) if self.account else self.answer(401, {"error": "who?"})

    def with_repository(self, name: str, respond: Callable, groups: dict[str, str]) -> None:
        known = {other.casefold(): other for other in self.server.repositories}
        found = known.get(name.casefold())
        repository = self.server.repositories.get(found or "")
        readable = repository and (not repository.private or (self.account and self.account.may_write(repository.name)))
        if repository is None or not readable:
            return self.refuse(404 if self.account else 401, "RepoNotFound", "Repository not found")
        if found != name:
            return self.answer(307, {}, {"Location": self.path.replace(name, repository.name)})
        respond(self, repository, **{key: value for key, value in groups.items() if key != "repository"})

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or self.account.name}/{asked['name']}"
        if not self.account.may_write(name):
            return self.refuse(403, "Forbidden", "You don't have the rights to create a model under this namespace")
        if name in self.server.repositories:
            return self.answer(
                409, {"error": "You already created this model repo", "url": f"{self.server.endpoint}/{name}"}
            )
        self.server.add(name, private=asked["visibility"] == "private")
        return self.answer(200, {"url": f"{self.server.endpoint}/{name}", "name": name})

    def validate(self) -> None:
        _, front, _ = json.loads(self.body)["content"].split("---\n", 2)
        try:
            card = yaml.safe_load(front)
        except yaml.YAMLError as error:
            return self.answer(400, {"errors": [{"message": str(error)}], "warnings": []})
        errors = []
        if "license" in card and card["license"] not in LICENSES:
            errors.append({"message": f'"license" must be one of [{", ".join(LICENSES)}]'})
        if not isinstance(card.get("base_model", ""), str):
            errors.append({"message": '"base_model" must be a string'})
        return self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def info(self, repository: Repository, revision: str | None = None) -> None:
        files = repository.files(revision or "main")
        if files is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        commit = repository.commits[-1][0] if revision in (None, "main") else revision
        answer = {
            "id": repository.name,
            "sha": commit,
            "private": repository.private,
            "siblings": [{"rfilename": path} for path in files],
            "tags": [],
        }
        if repository.card is not None:
            answer |= {"cardData": repository.card, "pipeline_tag": repository.card.get("pipeline_tag")}
        return self.answer(200, answer)

    def tree(self, repository: Repository, revision: str) -> None:
        """In pages of two, as a long listing comes."""
        files = sorted((repository.files(revision) or {}).items())
        start = int((re.search(r"cursor=(\d+)", self.query) or [0, 0])[1])
        entries = []
        for path, content in files[start : start + 2]:
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
            if is_large(path, content):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        following = f"{self.server.endpoint}{self.resource}?recursive=True&cursor={start + 2}"
        self.answer(200, entries, {"Link": f'<{following}>; rel="next"'} if start + 2 < len(files) else {})

    def resolve(self, repository: Repository, revision: str, path: str) -> None:
        content = (repository.files(revision) or {}).get(path)
        commit = repository.commits[-1][0] if revision == "main" else revision
        if content is None:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        headers = {"ETag": f'"{git_hash(content)}"', "X-Repo-Commit": commit}
        span = self.headers.get("Range", "").removeprefix("bytes=")
        if not span:
            return self.answer(200, content, headers)
        start, _, end = span.partition("-")
        stop = min(int(end) + 1 if end else len(content), len(content))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return self.answer(206, content[int(start) : stop], headers)

    def writable(self, repository: Repository) -> bool:
        if self.account is None or not self.account.may_write(repository.name):
            self.refuse(403, "Forbidden", "You don't have the rights to write to this repository")
            return False
        return True

    def auth_check(self, repository: Repository, write: str | None) -> None:
        if not write or self.writable(repository):
            self.answer(200, {})

    def preupload(self, repository: Repository, revision: str) -> None:
        if not self.writable(repository):
            return
        present = repository.files(revision)
        ignored = present.get(".gitignore", b"").decode().split()
        answer = []
        for asked in json.loads(self.body)["files"]:
            large = is_large(asked["path"], b"", asked["size"])
            entry = {"path": asked["path"], "uploadMode": "lfs" if large else "regular"}
            entry["shouldIgnore"] = any(fnmatch(asked["path"], pattern) for pattern in ignored)
            if (content := present.get(asked["path"])) is not None:
                entry["oid"] = hashlib.sha256(content).hexdigest() if large else git_hash(content)
            answer.append(entry)
        self.answer(200, {"files": answer})

    def batch(self, repository: Repository) -> None:
        if not self.writable(repository):
            return
        objects = []
        for asked in json.loads(self.body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            entry: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.server.storage:
                address = f"{self.server.endpoint}/storage/{oid}"
                upload: dict[str, Any] = {"href": f"{address}?{SIGNATURE}"}
                if size > self.server.part_bytes:
                    n_parts = -(-size // self.server.part_bytes)
                    parts = {str(i + 1): f"{address}/{i + 1}?{SIGNATURE}" for i in range(n_parts)}
                    upload = {
                        "href": f"{address}/complete",
                        "header": {"chunk_size": str(self.server.part_bytes), **parts},
                    }
                entry["actions"] = {"upload": upload, "verify": {"href": f"{address}/verify"}}
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def store(self) -> None:
        """The storage behind signed addresses, which must never see a token."""
        oid, _, rest = self.resource.removeprefix("/storage/").partition("/")
        if rest == "verify":
            known = len(self.server.storage.get(oid, b"")) == json.loads(self.body)["size"]
            return self.answer(200 if known else 404, {})
        if self.headers.get("Authorization") is not None:
            return self.answer(400, {"error": "two kinds of authentication"})
        if rest == "complete":
            parts = json.loads(self.body)["parts"]
            content = b"".join(self.server.parts[oid][part["partNumber"]] for part in parts)
            return self.keep(oid, content)
        if SIGNATURE not in self.query:
            return self.answer(403, {"error": "not signed"})
        self.server.stored_bytes[oid] += len(self.body)
        if rest:
            self.server.parts.setdefault(oid, {})[int(rest)] = self.body
            return self.answer(200, {}, {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})
        return self.keep(oid, self.body)

    def keep(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            return self.answer(400, {"error": "the content has another hash"})
        self.server.storage[oid] = content
        self.server.on_stored(oid)
        return self.answer(200, {})

    def commit(self, repository: Repository, revision: str) -> None:
        if not self.writable(repository):
            return
        lines = [json.loads(line) for line in self.body.splitlines()]
        if lines[0]["key"] != "header" or not lines[0]["value"]["summary"]:
            return self.answer(400, {"error": "a commit needs a summary"})
        if lines[0]["value"].get("parentCommit", repository.commits[-1][0]) != repository.commits[-1][0]:
            return self.answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = dict(repository.commits[-1][1])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                stored = self.server.storage if self.server.xet is None else self.server.xet[1]
                if value["oid"] not in stored:
                    return self.answer(
                        400, {"error": f"LFS pointer pointed to a file that does not exist: {value['path']}"}
                    )
                files[value["path"]] = stored[value["oid"]]
            elif line["key"] == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            else:
                return self.answer(400, {"error": f"no such operation: {line}"})
        commit = repository.commit(files)
        url = f"{self.server.endpoint}/{repository.name}/commit/{commit}"
        return self.answer(200, {"success": True, "commitOid": commit, "commitUrl": url})

    def xet_token(self, repository: Repository, revision: str) -> None:
        if self.server.xet is None:
            return self.answer(404, {"error": "no such address"})
        answer = {"casUrl": self.server.xet[0], "accessToken": "xet", "exp": 4_000_000_000}
        return self.answer(200, answer)


_FIXED: dict[str, Callable[..., None]] = {
    "/api/whoami-v2": _Handler.whoami,
    "/api/repos/create": _Handler.create,
    "/api/validate-yaml": _Handler.validate,
}
_API = r"/api/models/(?P<repository>[^/]+/[^/]+)"
_ROUTES: list[tuple[str, Callable[..., None]]] = [
    (_API, _Handler.info),
    (_API + r"/revision/(?P<revision>[^/]+)", _Handler.info),
    (_API + r"/tree/(?P<revision>[^/]+)", _Handler.tree),
    (_API + r"/auth-check(?P<write>/write)?", _Handler.auth_check),
    (_API + r"/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    (_API + r"/commit/(?P<revision>[^/]+)", _Handler.commit),
    (_API + r"/xet-write-token/(?P<revision>[^/]+)", _Handler.xet_token),
    (r"/(?P<repository>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.batch),
    (r"/(?P<repository>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(path: str, content: bytes, size: int | None = None) -> bool:
    return path.endswith((".gguf", ".safetensors")) or (len(content) if size is None else size) > 10_000_000


@contextmanager
def serve(accounts: dict[str, Account], **options: Any) -> Iterator[WritableHub]:
    server = WritableHub(accounts, **options)
    thread = Thread(target=server.serve_forever, args=(_POLL_SECONDS,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
