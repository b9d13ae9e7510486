"""A small Hub on this machine: serves a directory as the model repository org/tiny, and records what was asked for."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

REPOSITORY = "org/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# How often the server looks whether it is to end, which whoever ends it waits for.
_POLL_SECONDS = 0.01


class HubServer(ThreadingHTTPServer):
    def __init__(self, directory: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.directory = directory
        # (method, file name, the Range header or None)
        self.requests: list[tuple[str, str, str | None]] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def downloaded(self) -> set[str]:
        """Names of the files that were fetched whole."""
        return {name for method, name, span in self.requests if method == "GET" and span is None}


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or an answer waits 40 ms for the acknowledgement of its headers

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/models/{REPOSITORY}"):
            self._answer_api(path.removeprefix(f"/api/models/{REPOSITORY}"))
        elif path.startswith(f"/{REPOSITORY}/resolve/"):
            self._answer_file(path.split("/", 5)[5])
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass

    def _answer_api(self, rest: str) -> None:
        directory = self.server.directory
        names = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
        if rest.startswith("/tree/"):
            entries = [self._tree_entry(name) for name in names]
            self._send(200, json.dumps(entries).encode())
        elif rest in ("", "/revision/main", f"/revision/{COMMIT}"):
            info = {"id": REPOSITORY, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            self._send(200, json.dumps(info).encode())
        else:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})

    def _tree_entry(self, name: str) -> dict[str, object]:
        content = (self.server.directory / name).read_bytes()
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha256(content).hexdigest()}

    def _answer_file(self, name: str) -> None:
        path = self.server.directory / name
        if not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        content, span = path.read_bytes(), self.headers.get("Range")
        if self.command == "GET" or span is not None:
            self.server.requests.append((self.command, name, span))
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if span is None:
            self._send(200, content, headers)
        else:
            start, _, end = span.removeprefix("bytes=").partition("-")
            stop = min(int(end) + 1 if end else len(content), len(content))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            self._send(206, content[int(start) : stop], headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serve(directory: Path) -> Iterator[HubServer]:
    server = HubServer(directory)
    thread = Thread(target=server.serve_forever, args=(_POLL_SECONDS,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
