"""A web server on this machine that serves a folder and fails on purpose, and answers as the Hub does for datasets.

Set its attributes to say how: the next answers that fail count down, `drop_every` goes on.
"""

import http.server
import json
import re
import socket
import struct
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote

COMMIT = "c0ffee" + "0" * 34


class FailingServer:
    """Serves the files under `root` at `url`, and as the dataset test/recorded of a Hub at `hub_url`.

    Attributes:
        drop_every: the connection is cut in the middle of every so many answers (0: of none).
        unavailable: so many answers are 503, with `retry_after`.
        short: so many answers end before they have as many bytes as announced.
        hanging: so many answers stop in the middle for `hang_seconds`.
        ignores_ranges: every answer is the whole file.
        delay: seconds before each answer.
        requests: "METHOD path range" of each.
        num_bytes: sent, of files.
    """

    def __init__(self, root: Path):
        self.root = root
        self.drop_every = self.unavailable = self.short = self.hanging = 0
        self.hang_seconds, self.delay = 1.0, 0.0
        self.ignores_ranges = False
        self.retry_after = ""
        self.requests: list[str] = []
        self.num_bytes = self.num_answers = 0
        self.lock = threading.Lock()
        self._released = threading.Event()
        handler = type("Handler", (_Handler,), {"server_of": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.hub_url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.url = f"{self.hub_url}/files"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def hang(self) -> None:
        self._released.wait(self.hang_seconds)

    def take(self, name: str) -> bool:
        """Tell whether this answer fails in a way of which some are left."""
        with self.lock:
            left = getattr(self, name)
            setattr(self, name, max(0, left - 1))
            return left > 0

    def close(self) -> None:
        """Go away for good."""
        if self._thread.is_alive():
            self._released.set()
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    server_of: FailingServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server = self.server_of
        path = unquote(self.path.partition("?")[0])
        with server.lock:
            server.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        time.sleep(server.delay)
        if server.take("unavailable"):
            self._send(b"busy", 503, {"Retry-After": server.retry_after} if server.retry_after else None)
        elif found := re.fullmatch(rf"/files/(.+)|/datasets/test/recorded/resolve/{COMMIT}/(.+)", path):
            self._send_file(found[1] or found[2])
        else:
            self._answer_as_hub(path)

    do_HEAD = do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Keep quiet."""

    def _send(self, body: bytes, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_file(self, name: str) -> None:
        server, path = self.server_of, self.server_of.root / name
        if not path.is_file():
            self._send(b"", 404, {"X-Error-Code": "EntryNotFound"})
            return
        data = path.read_bytes()
        headers = {"ETag": f'"{path.stat().st_mtime_ns}-{len(data)}"', "X-Repo-Commit": COMMIT}
        status = 200
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if found and not server.ignores_ranges:
            start, end = int(found[1]), min(int(found[2] or len(data)) + 1, len(data))
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
            status, data = 206, data[start:end]
        with server.lock:
            server.num_answers += len(data) > 1
            dropped = server.drop_every and len(data) > 1 and server.num_answers % server.drop_every == 0
        fails = [name for name in ("short", "hanging") if len(data) > 1 and server.take(name)]
        body = data[: len(data) // 2] if dropped or fails else data
        server.num_bytes += len(body)
        try:
            self._send(body, status, headers | {"Content-Length": str(len(data))})
            if "hanging" in fails:
                self.wfile.flush()
                server.hang()
        except ConnectionError:
            self.close_connection = True
            return
        if dropped:  # with a reset
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        if dropped or fails:
            self.close_connection = True

    def _answer_as_hub(self, path: str) -> None:
        api = "/api/datasets/test/recorded"
        files = sorted(p for p in self.server_of.root.rglob("*") if p.is_file())
        names = [str(p.relative_to(self.server_of.root)) for p in files]
        answer: Any
        if path == f"{api}/refs":
            tag = {"name": "v3.0", "ref": "refs/tags/v3.0", "targetCommit": COMMIT}
            answer = {"tags": [tag], "branches": [], "converts": []}
        elif path in (f"{api}/revision/v3.0", f"{api}/revision/{COMMIT}"):
            answer = {"id": "test/recorded", "sha": COMMIT, "siblings": [], "tags": []}
        elif found := re.fullmatch(rf"{api}/tree/{COMMIT}/?(.*)", path):
            inside = [(n, p) for n, p in zip(names, files, strict=True) if str(Path(n).parent) == found[1]]
            answer = [
                {"type": "file", "path": name, "size": p.stat().st_size, "oid": "0" * 40}
                for name, p in inside
            ]
        else:
            self._send(
                json.dumps({"error": "no such repository"}).encode(), 404, {"X-Error-Code": "RepoNotFound"}
            )
            return
        self._send(json.dumps(answer).encode(), 200)
