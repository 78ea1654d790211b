"""A small Hugging Face Hub for tests: an HTTP server on this machine that keeps repositories in memory.

It answers the calls that `huggingface_hub` makes to make a repository, commit to it, list it and download it, with
the real Hub's status codes and headers. Large files (`*.safetensors`) go the way of Git LFS.
"""

import base64
import dataclasses
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import unquote

import huggingface_hub.constants
import pytest

TOKENS = {"hf_alice": "alice", "hf_bob": "bob"}
Files = dict[str, bytes]


@dataclasses.dataclass
class Repository:
    """One model: `commits` maps a commit to all its files, `refs` a branch or tag to a commit."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = dataclasses.field(default_factory=dict)
    refs: dict[str, str] = dataclasses.field(default_factory=dict)

    def commit(self, files: Files, branch: str = "main") -> str:
        content = repr((len(self.commits), sorted(files), branch)).encode()
        name = hashlib.sha1(content).hexdigest()
        self.commits[name] = files
        self.refs[branch] = name
        return name

    def resolve(self, revision: str) -> str | None:
        name = self.refs.get(revision, revision)
        return name if name in self.commits else None


class FakeHub:
    """The server. `cut` says how many more downloads of a file break off, `cut_after` after which part of it."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.cut: dict[str, int] = {}
        self.cut_after = 0.5
        self.calls: list[str] = []
        handler = type("Handler", (Handler,), {"hub": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def files(self, repo_id: str, revision: str = "main") -> Files:
        repository = self.repositories[repo_id]
        commit = repository.resolve(revision)
        assert commit is not None
        return repository.commits[commit]


class Refused(Exception):
    """An answer that is an error: its status and the Hub's code and message for it."""

    def __init__(self, status: int, code: str = "", message: str = ""):
        super().__init__(status, code, message)
        self.status = status
        self.headers = {"X-Error-Code": code} | ({"X-Error-Message": message} if message else {})


class Handler(http.server.BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *_: object) -> None:
        """Keep quiet."""

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.calls.append(f"{self.command} {unquote(path)}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b"".join(self._chunks())
        try:
            for pattern, method in ROUTES.items():
                match = re.fullmatch(pattern, f"{self.command} {path}")
                if match is not None:
                    getattr(self, method)(*map(unquote, match.groups()))
                    return
            raise Refused(404)
        except Refused as refused:
            self._send({"error": refused.args[2]}, refused.status, refused.headers)

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _send(self, data: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _user(self) -> str | None:
        authorization = self.headers.get("Authorization")
        if authorization is None:
            return None
        user = TOKENS.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise Refused(401, message="Invalid credentials in Authorization header")
        return user

    def _readable(self, repo_id: str) -> Repository:
        user = self._user()
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and user != repo_id.split("/")[0]):
            raise Refused(401 if user is None else 404, "RepoNotFound", "Invalid username or password.")
        return repository

    def _writable(self, repo_id: str) -> Repository:
        repository = self._readable(repo_id)
        if self._user() != repo_id.split("/")[0]:
            raise Refused(403, message="You don't have the rights to write")
        return repository

    def _commit_of(self, repository: Repository, revision: str) -> str:
        commit = repository.resolve(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def validate_card(self) -> None:
        assert json.loads(self.body)["content"].startswith("---\n")
        self._send({"errors": [], "warnings": []})

    def create(self) -> None:
        data = json.loads(self.body)
        user = self._user()
        if user is None:
            raise Refused(401)
        repo_id = f"{data['organization'] or user}/{data['name']}"
        if repo_id.split("/")[0] != user:
            raise Refused(
                403, message=f"You don't have the rights to create a model under {data['organization']}"
            )
        if repo_id in self.hub.repositories:
            self._send({"url": f"{self.hub.url}/{repo_id}"}, 409)
            return
        private = data.get("visibility") == "private" or data.get("private", False)
        self.hub.repositories[repo_id] = Repository(private)
        self.hub.repositories[repo_id].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self._send({"url": f"{self.hub.url}/{repo_id}", "name": repo_id})

    def branch(self, repo_id: str, branch: str) -> None:
        repository = self._writable(repo_id)
        if branch in repository.refs:
            raise Refused(409)
        repository.refs[branch] = repository.refs["main"]
        self._send({})

    def info(self, repo_id: str, revision: str = "main") -> None:
        repository = self._readable(repo_id)
        commit = self._commit_of(repository, revision)
        siblings = [{"rfilename": name} for name in repository.commits[commit]]
        about = {"id": repo_id, "sha": commit, "private": repository.private, "gated": repository.gated}
        self._send(about | {"siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, repo_id: str, revision: str) -> None:
        repository = self._readable(repo_id)
        files = repository.commits[self._commit_of(repository, revision)]
        self._send(
            [{"type": "file", "path": name} | _description(name, data) for name, data in files.items()]
        )

    def preupload(self, repo_id: str, revision: str) -> None:
        files = self._writable(repo_id).commits[self._commit_of(self._readable(repo_id), revision)]
        answers = []
        for file in json.loads(self.body)["files"]:
            name = file["path"]
            old = _description(name, files[name]) if name in files else {}
            oid = old.get("lfs", {}).get("oid") or old.get("oid")
            mode = "lfs" if _is_large(name) else "regular"
            answers.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send({"files": answers})

    def lfs_batch(self, repo_id: str) -> None:
        self._writable(repo_id)
        objects = []
        for entry in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/blobs/{entry['oid']}"}}
            objects.append(entry | ({} if entry["oid"] in self.hub.blobs else {"actions": upload}))
        self._send({"transfer": "basic", "objects": objects})

    def put_blob(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.blobs[oid] = self.body
        self._send({})

    def commit(self, repo_id: str, branch: str) -> None:
        repository = self._writable(repo_id)
        files = dict(repository.commits[self._commit_of(repository, branch)])
        for line in self.body.splitlines():
            key, value = json.loads(line)["key"], json.loads(line)["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(files, branch)
        self._send({"commitUrl": f"{self.hub.url}/{repo_id}/commit/{commit}", "commitOid": commit})

    def resolve(self, repo_id: str, revision: str, name: str) -> None:
        repository = self._readable(repo_id)
        if repository.gated and self._user() != repo_id.split("/")[0]:
            raise Refused(401 if self._user() is None else 403, "GatedRepo", "Access is restricted")
        commit = self._commit_of(repository, revision)
        if name not in repository.commits[commit]:
            raise Refused(404, "EntryNotFound", "Entry not found")
        data = repository.commits[commit][name]
        about = _description(name, data)
        etag = about.get("lfs", about)["oid"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if "lfs" in about:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.command == "GET" and self.hub.cut.get(name, 0) > 0:
            self.hub.cut[name] -= 1
            self._break_off(data[start:], headers, 206 if start else 200)
        else:
            self._send(data[start:], 206 if start else 200, headers)

    def _break_off(self, data: bytes, headers: Mapping[str, str], status: int) -> None:
        """Promise everything, send a part and hang up."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: int(len(data) * self.hub.cut_after)])
        self.close_connection = True


ROUTES = {
    r"POST /api/validate-yaml": "validate_card",
    r"POST /api/repos/create": "create",
    r"POST /api/models/([^/]+/[^/]+)/branch/([^/]+)": "branch",
    r"GET /api/models/([^/]+/[^/]+)": "info",
    r"GET /api/models/([^/]+/[^/]+)/revision/([^/]+)": "info",
    r"GET /api/models/([^/]+/[^/]+)/tree/([^/]+)": "tree",
    r"POST /api/models/([^/]+/[^/]+)/preupload/([^/]+)": "preupload",
    r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch": "lfs_batch",
    r"PUT /blobs/(\w+)": "put_blob",
    r"POST /api/models/([^/]+/[^/]+)/commit/([^/]+)": "commit",
    r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)": "resolve",
}


def _is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


def _description(name: str, data: bytes) -> dict:
    """Give a file's size and names as the Hub's listings do: Git's hash, and the content's if it is large."""
    oid = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
    if not _is_large(name):
        return {"size": len(data), "oid": oid}
    lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return {"size": len(data), "oid": oid, "lfs": lfs}


@contextmanager
def connected(home) -> Iterator[FakeHub]:
    """Start a Hub and point this process at it, as alice, with caches in the folder `home`."""
    constants = huggingface_hub.constants
    hub = FakeHub()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        patch.setenv("HF_TOKEN", "hf_alice")
        yield hub
    hub.close()
