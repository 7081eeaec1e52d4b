"""A Hugging Face Hub in memory, over HTTP on this machine: what huggingface_hub asks for when models are
pushed and loaded, and the faults that tests order.

    with Hub() as hub:
        run_client(hub, "from transformers import AutoModel ...", home=tmp_path)

Clients are processes of their own, since huggingface_hub reads HF_ENDPOINT once, when it is imported.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[1]
LARGE = (".safetensors", ".bin", ".pt", ".pth")  # stored as LFS objects
PRELUDE = """
import socket
connect_anywhere = socket.socket.connect
def connect(self, address):
    assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "localhost"), f"leaves: {address}"
    return connect_anywhere(self, address)
socket.socket.connect = connect
"""
WITHOUT_PACKAGE = "import sys\nsys.modules['hf_vlp'] = None\n"


@dataclass
class File:
    """A file of a commit; `sha256` names its content among the Hub's."""

    sha256: str
    size: int
    is_large: bool

    @property
    def oid(self) -> str:
        return hashlib.sha1(f"{self.sha256}{self.is_large}".encode()).hexdigest()

    def entry(self, path: str) -> dict:
        entry = {"type": "file", "oid": self.oid, "size": self.size, "path": path}
        lfs = {"oid": self.sha256, "size": self.size, "pointerSize": 134}
        return entry | {"lfs": lfs} if self.is_large else entry


@dataclass
class Repo:
    """Commits of a repository, each a table of files by path, and the commit of each branch."""

    name: str
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, File], title: str) -> str:
        sha = hashlib.sha1(f"{self.name} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.titles.append(title)
        return sha

    def find(self, revision: str) -> str | None:
        sha = self.branches.get(revision, revision)
        return sha if sha in self.commits else None

    def files(self, revision: str = "main") -> dict[str, File]:
        return self.commits[self.find(revision)]


@dataclass
class Fault:
    """What happens to `times` requests with `method` whose path matches `pattern`, once `after` of them went
    well: an answer with `status`, or a content that is `cut` short."""

    method: str
    pattern: str
    times: int
    status: int | None = None
    cut: str | None = None
    after: int = 0


class Hub:
    """The server. `requests` lists methods and paths, `blobs` holds contents by their SHA-256.

    `cut` of a fault is "connection", which breaks in the middle, or "file", which is served as if it were
    shorter.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def read(self, name: str, path: str, revision: str = "main") -> bytes:
        return self.blobs[self.repos[name].files(revision)[path].sha256]

    def write(self, name: str, files: dict[str, bytes], branch: str = "main"):
        """Commit files past the client, as a person would on the website."""
        repo = self.repos.setdefault(name, Repo(name))
        kept = repo.files(branch) if branch in repo.branches else {}
        added = {path: self.store(content, path.endswith(LARGE)) for path, content in files.items()}
        repo.commit(branch, kept | added, "by hand")

    def store(self, content: bytes, is_large: bool) -> File:
        sha256 = hashlib.sha256(content).hexdigest()
        self.blobs[sha256] = content
        return File(sha256, len(content), is_large)

    def fault_of(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and fault.method == method and re.search(fault.pattern, path):
                if fault.after:
                    fault.after -= 1
                    continue
                fault.times -= 1
                return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # which holds back each body by 40 ms

    def log_message(self, *_):
        pass

    def answer(self):
        hub: Hub = self.server.hub
        path, body = unquote(urlsplit(self.path).path), self._body()
        hub.requests.append((self.command, path))
        self.fault = hub.fault_of(self.command, path)
        if self.fault is not None and self.fault.status is not None:
            return self._json({"error": "out of order"}, self.fault.status)
        for pattern, reply in _ROUTES:
            if match := re.fullmatch(pattern, path):
                return reply(self, hub, body, *match.groups())
        return self._json({"error": f"no such route: {path}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return b"".join(self._chunks())

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _send(self, content: bytes, status: int = 200, **headers: str):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value, status: int = 200, **headers: str):
        self._send(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

    def _missing(self, what: str, **headers: str):
        """As the Hub tells what is missing: `Repo`, `Revision` or `Entry`."""
        self._json({"error": f"{what} not found"}, 404, X_Error_Code=f"{what}NotFound", **headers)

    # Repositories

    def create(self, hub: Hub, body: bytes):
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'user'}/{asked['name']}"
        url = f"{hub.url}/{name}"
        if name in hub.repos:
            return self._json({"error": "exists", "url": url}, 409, X_Error_Code="RepoExists")
        repo = hub.repos[name] = Repo(name)
        repo.commit("main", {}, "initial commit")
        return self._json({"url": url, "name": name})

    def api(self, hub: Hub, body: bytes, name: str, action: str | None, rest: str | None):
        repo = hub.repos.get(name)
        if repo is None:
            return self._missing("Repo")
        if action == "branch":
            if rest in repo.branches:
                return self._json({"error": "exists"}, 409)
            repo.branches[rest] = repo.find(json.loads(body or b"{}").get("startingPoint") or "main")
            return self._json({})
        revision, folder = rest or "main", ""
        if action == "tree":
            revision, _, folder = revision.partition("/")
        sha = repo.find(revision)
        if sha is None:
            return self._missing("Revision")
        files = repo.commits[sha]
        if action in (None, "revision"):
            siblings = [{"rfilename": path, "size": file.size} for path, file in files.items()]
            return self._json({"_id": "0", "id": name, "modelId": name, "sha": sha, "siblings": siblings})
        if action == "tree":
            entries = [file.entry(path) for path, file in sorted(files.items()) if path.startswith(folder)]
            return self._json(entries) if entries or not folder else self._missing("Entry")
        if action == "preupload":
            return self._json({"files": [_upload_mode(file, files) for file in json.loads(body)["files"]]})
        return self._commit(hub, repo, revision, [json.loads(line) for line in body.splitlines()])

    def _commit(self, hub: Hub, repo: Repo, branch: str, operations: list[dict]):
        files, title = dict(repo.files(branch)), ""
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            if kind == "header":
                title = value["summary"]
            elif kind == "file":
                files[value["path"]] = hub.store(base64.b64decode(value["content"]), is_large=False)
            elif kind == "lfsFile":
                if value["oid"] not in hub.blobs:
                    return self._json({"error": f"{value['path']} was not uploaded"}, 400)
                files[value["path"]] = File(value["oid"], value["size"], is_large=True)
            elif kind == "deletedFile":
                files.pop(value["path"])
        sha = repo.commit(branch, files, title)
        return self._json(
            {"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/{repo.name}/commit/{sha}"}
        )

    # Contents

    def lfs_batch(self, hub: Hub, body: bytes, name: str):
        objects = json.loads(body)["objects"]
        for asked in objects:
            if asked["oid"] not in hub.blobs:
                upload, verify = (
                    {"href": f"{hub.url}/{name}/lfs/{part}"} for part in (asked["oid"], "verify")
                )
                asked["actions"] = {"upload": upload, "verify": verify}
        self._json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, hub: Hub, body: bytes, name: str, oid: str):
        if hashlib.sha256(body).hexdigest() != oid:
            return self._json({"error": "another content"}, 400)
        hub.blobs[oid] = body
        return self._send(b"")

    def resolve(self, hub: Hub, body: bytes, name: str, revision: str, path: str):
        repo = hub.repos.get(name)
        if repo is None:
            return self._missing("Repo")
        sha = repo.find(revision)
        if sha is None:
            return self._missing("Revision")
        if path not in repo.commits[sha]:
            return self._missing("Entry", X_Repo_Commit=sha)
        file = repo.commits[sha][path]
        headers = {"X_Repo_Commit": sha, "ETag": f'"{file.oid}"', "Accept_Ranges": "bytes"}
        if file.is_large:  # served in place: a client that follows a redirection here loses X-Repo-Commit
            headers |= {"X_Linked_ETag": f'"{file.sha256}"', "X_Linked_Size": str(file.size)}
        return self._serve(hub.blobs[file.sha256], headers)

    def _serve(self, content: bytes, headers: dict[str, str]):
        cut = self.fault.cut if self.fault is not None else None
        if cut == "file":
            return self._send(content[: len(content) // 2], **headers)
        status, asked = 200, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            first, last = int(asked[1]), int(asked[2] or len(content) - 1)
            headers |= {"Content_Range": f"bytes {first}-{last}/{len(content)}"}
            status, content = 206, content[first : last + 1]
        if cut == "connection":
            self._send(content[: len(content) // 2], status, Content_Length=str(len(content)), **headers)
            self.close_connection = True
        else:
            self._send(content, status, **headers)


def _upload_mode(asked: dict, files: dict[str, File]) -> dict:
    path = asked["path"]
    mode = "lfs" if path.endswith(LARGE) else "regular"
    oid = files[path].oid if path in files else None
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}


_NAME = r"([\w.-]+/[\w.-]+)"  # of a model, a data set or a Space, which share names here
_ROUTES = [
    (r"/api/repos/create", _Handler.create),
    (r"/api/validate-yaml", lambda self, hub, body: self._json({"errors": [], "warnings": []})),
    (
        rf"/api/(?:models|datasets|spaces)/{_NAME}(?:/(revision|tree|branch|preupload|commit)/(.+))?",
        _Handler.api,
    ),
    (rf"/(?:datasets/|spaces/)?{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (rf"/(?:datasets/|spaces/)?{_NAME}/lfs/verify", lambda self, hub, body, name: self._json({})),
    (rf"/{_NAME}/lfs/(\w+)", _Handler.lfs_upload),
    (rf"/(?:datasets/|spaces/)?{_NAME}/(?:resolve|raw)/([^/]+)/(.+)", _Handler.resolve),
]


def run_client(
    hub: Hub, script: str, home: Path, *arguments, package: bool = True, offline: bool = False
) -> dict:
    """Run a script in a process of its own that knows `hub` alone, with or without this package.

    The script finds the modules of the tests, gets `arguments` in `sys.argv`, keeps its cache in `home`, and
    may end by printing JSON, which is returned.
    """
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    inherited = [path for path in inherited if not Path(path, "hf_vlp").exists()]
    own = [str(ROOT / "src")] if package else []
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": "hf_test",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": str(int(offline)),
        "PYTHONPATH": os.pathsep.join([*own, str(ROOT / "tests"), *inherited]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": os.environ["PATH"],
    }
    script = PRELUDE + ("" if package else WITHOUT_PACKAGE) + script
    command = [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.strip().splitlines()[-1:]
    return json.loads(last[0]) if last and last[0].startswith('{"') else {}
