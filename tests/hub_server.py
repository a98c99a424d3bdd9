"""A stand-in for the Hugging Face Hub on this machine, at the level of `huggingface_hub`.

It speaks the part of the Hub's HTTP interface that uploading, listing and downloading need: who am
I, make a repository or a branch, upload modes, LFS upload, commit, repository and file information, download
with ranges. Everything is in memory.

    with HubServer() as hub:
        subprocess.run([...], env=os.environ | hub.environment(tmp_path))
        hub.files("user/name", "dataset")  # {path: bytes}
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of_the_stand_in"
USER = "user"
LFS_SUFFIXES = (".parquet", ".png", ".jpg", ".safetensors", ".bin", ".onnx", ".pt")
# Repositories of models have no prefix in their addresses; those of datasets and spaces have.
KINDS = {"datasets": "dataset", "spaces": "space", "models": "model"}


class HubServer:
    """The server; a context manager that runs it in a thread.

    Attributes:
        requests: (method, path) of every request so far.
    """

    def __init__(self):
        self.requests: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        self._blobs: dict[str, bytes] = {}
        # (kind, id) -> branch -> commits, oldest first; a commit is (its sha, {path: content}).
        self._repositories: dict[tuple[str, str], dict[str, list[tuple[str, dict[str, bytes]]]]] = {}
        self._private: set[tuple[str, str]] = set()

    def __enter__(self) -> "HubServer":
        handler = type("Handler", (HubRequestHandler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        """The address of the server."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, home: Path) -> dict[str, str]:
        """Variables with which a process takes this server for the Hub and is logged in.

        Args:
            home: a folder for the process's caches.
        """
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # the server offers plain LFS only
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def files(self, repo_id: str, kind: str = "model", branch: str = "main") -> dict[str, bytes]:
        """The files of a branch's newest commit.

        Raises:
            KeyError: there is no such repository or branch.
        """
        return dict(self._repositories[kind, repo_id][branch][-1][1])

    def commits(self, repo_id: str, kind: str = "model") -> int:
        """How many commits a repository's main branch has had since it was made."""
        return len(self._repositories[kind, repo_id]["main"]) - 1

    def is_private(self, repo_id: str, kind: str = "model") -> bool:
        """Whether a repository was made to be private."""
        return (kind, repo_id) in self._private

    # What follows is for the request handler.

    def create(self, kind: str, repo_id: str, private: bool = False) -> bool:
        """Makes an empty repository; False if there is one."""
        with self._lock:
            if (kind, repo_id) in self._repositories:
                return False
            if private:
                self._private.add((kind, repo_id))
            self._repositories[kind, repo_id] = {"main": [(_sha1(repo_id.encode()), {})]}
            return True

    def create_branch(self, kind: str, repo_id: str, branch: str) -> bool:
        """Makes a branch that starts as the main one is; False if there is one."""
        with self._lock:
            branches = self._repositories[kind, repo_id]
            if branch in branches:
                return False
            branches[branch] = list(branches["main"])
            return True

    def revision(self, kind: str, repo_id: str, name: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit that is called `name`, a branch or a sha; None if there is none."""
        branches = self._repositories[kind, repo_id]
        if commits := branches.get(name.removeprefix("refs/heads/")):
            return commits[-1]
        return next((commit for commits in branches.values() for commit in commits if commit[0] == name), None)

    def exists(self, kind: str, repo_id: str) -> bool:
        """Whether there is such a repository."""
        return (kind, repo_id) in self._repositories

    def has_blob(self, oid: str) -> bool:
        """Whether an LFS object has been uploaded."""
        return oid in self._blobs

    def add_blob(self, oid: str, data: bytes) -> bool:
        """Stores an LFS object; False if its content is not what its name says."""
        if hashlib.sha256(data).hexdigest() != oid:
            return False
        self._blobs[oid] = data
        return True

    def commit(self, kind: str, repo_id: str, operations: list[dict], branch: str = "main") -> str:
        """Applies the operations of a commit; returns its sha."""
        with self._lock:
            commits = self._repositories[kind, repo_id][branch]
            files = dict(commits[-1][1])
            for operation in operations:
                value = operation["value"]
                match operation["key"]:
                    case "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    case "lfsFile":
                        files[value["path"]] = self._blobs[value["oid"]]
                    case "deletedFile":
                        del files[value["path"]]
                    case "deletedFolder":
                        folder = value["path"].rstrip("/") + "/"
                        files = {p: data for p, data in files.items() if not p.startswith(folder)}
            sha = _sha1(repr((commits[-1][0], sorted(files.items()))).encode())
            commits.append((sha, files))
            return sha


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


class HubRequestHandler(BaseHTTPRequestHandler):
    """Answers one request after another of one connection."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        """Keeps the test output clean."""

    def do_GET(self) -> None:
        self._dispatch()

    do_HEAD = do_POST = do_PUT = do_GET

    def _dispatch(self) -> None:
        url = urlsplit(self.path)
        self.hub.requests.append((self.command, url.path))
        self._query = parse_qs(url.query)
        self._body = self._read_body()
        for methods, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, url.path)
            if match and self.command in methods:
                answer(self, **{k: unquote(v or "") for k, v in match.groupdict().items()})
                return
        self._error(404, "NotFound", f"the stand-in has no {self.command} {url.path}")

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    # -------------------------------------------------------------------------------- answers

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str) -> None:
        self._send(
            status,
            json.dumps({"error": message}).encode(),
            {"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json"},
        )

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _logged_in(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._error(401, "Unauthorized", "Invalid username or password.")
        return False

    def _find(self, kind: str, repo_id: str, revision: str) -> tuple[str, dict] | None:
        """The commit that a request is about, or None after an error has been sent."""
        if not self.hub.exists(kind, repo_id):
            self._error(404, "RepoNotFound", "Repository not found")
            return None
        found = self.hub.revision(kind, repo_id, revision or "main")
        if found is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def who_am_i(self) -> None:
        if self._logged_in():
            token = {"role": "write", "displayName": "stand-in"}
            self._json(
                {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": token}},
            )

    def create_repository(self) -> None:
        if not self._logged_in():
            return
        request = json.loads(self._body)
        kind = request.get("type") or "model"
        repo_id = f"{request.get('organization') or USER}/{request['name']}"
        prefix = "" if kind == "model" else f"{kind}s/"
        answer = {"url": f"{self.hub.endpoint}/{prefix}{repo_id}", "name": repo_id, "id": repo_id}
        private = bool(request.get("private")) or request.get("visibility") == "private"
        if self.hub.create(kind, repo_id, private):
            self._json(answer)
        else:
            self._json(answer | {"error": "You already created this repository"}, 409)

    def create_branch(self, kinds: str, repo_id: str, branch: str) -> None:
        if not self._logged_in() or not self._find(KINDS[kinds], repo_id, "main"):
            return
        if self.hub.create_branch(KINDS[kinds], repo_id, branch):
            self._json({})
        else:
            self._error(409, "Conflict", "Reference already exists")

    def validate_yaml(self) -> None:
        self._json({"errors": [], "warnings": []})

    def upload_modes(self, kinds: str, repo_id: str, revision: str) -> None:
        if not self._logged_in() or not self._find(KINDS[kinds], repo_id, revision):
            return
        self._json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for file in json.loads(self._body)["files"]
                ]
            }
        )

    def lfs_batch(self, kinds: str, repo_id: str) -> None:
        if not self._logged_in():
            return
        objects = []
        for wanted in json.loads(self._body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if not self.hub.has_blob(wanted["oid"]):
                href = f"{self.hub.endpoint}/lfs/{wanted['oid']}"
                answer["actions"] = {"upload": {"href": href, "header": {}}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if self.hub.add_blob(oid, self._body):
            self._json({})
        else:
            self._error(400, "BadRequest", f"the content of {oid} has another sha256")

    def commit(self, kinds: str, repo_id: str, revision: str) -> None:
        kind = KINDS[kinds]
        if not self._logged_in() or not self._find(kind, repo_id, revision):
            return
        operations = [json.loads(line) for line in self._body.splitlines() if line.strip()]
        sha = self.hub.commit(kind, repo_id, operations, revision)
        url = f"{self.hub.endpoint}/{repo_id}/commit/{sha}"
        self._json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def repository(self, kinds: str, repo_id: str, revision: str = "") -> None:
        found = self._find(KINDS[kinds], repo_id, revision)
        if found:
            sha, files = found
            self._json(
                {
                    "_id": sha[:24],
                    "id": repo_id,
                    "modelId": repo_id,
                    "sha": sha,
                    "private": self.hub.is_private(repo_id, KINDS[kinds]),
                    "gated": False,
                    "disabled": False,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                    "lastModified": "2026-01-01T00:00:00.000Z",
                    "createdAt": "2026-01-01T00:00:00.000Z",
                    "siblings": [{"rfilename": path} for path in sorted(files)],
                }
            )

    def references(self, kinds: str, repo_id: str) -> None:
        found = self._find(KINDS[kinds], repo_id, "main")
        if found:
            branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": found[0]}
            self._json({"branches": [branch], "tags": [], "converts": []})

    def tree(self, kinds: str, repo_id: str, revision: str, folder: str = "") -> None:
        found = self._find(KINDS[kinds], repo_id, revision)
        if not found:
            return
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        recursive = self._query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = {}
        for path, data in sorted(found[1].items()):
            if not path.startswith(prefix):
                continue
            folders = path.removeprefix(prefix).split("/")[:-1]
            for depth in range(1, len(folders) + 1):
                if recursive or depth == 1:
                    name = prefix + "/".join(folders[:depth])
                    entries.setdefault(name, _folder_entry(name))
            if recursive or not folders:
                entries[path] = _file_entry(path, data)
        if prefix and not entries:
            self._error(404, "EntryNotFound", f"{folder} does not exist")
        else:
            self._json(list(entries.values()))

    def paths_info(self, kinds: str, repo_id: str, revision: str) -> None:
        found = self._find(KINDS[kinds], repo_id, revision)
        if not found:
            return
        if self.headers.get("Content-Type", "").startswith("application/json"):
            paths = json.loads(self._body)["paths"]
        else:
            paths = parse_qs(self._body.decode()).get("paths", [])
        files, entries = found[1], []
        for path in paths:
            if path in files:
                entries.append(_file_entry(path, files[path]))
            elif any(name.startswith(f"{path}/") for name in files):
                entries.append(_folder_entry(path))
        self._json(entries)

    def download(self, kinds: str, repo_id: str, revision: str, path: str) -> None:
        found = self._find(KINDS[kinds.rstrip("/") or "models"], repo_id, revision)
        if not found:
            return
        sha, files = found
        if path not in files:
            self._error(404, "EntryNotFound", "Entry not found")
            return
        data, status = files[path], 200
        headers = {
            "X-Repo-Commit": sha,
            "ETag": f'"{_file_entry(path, data)["oid"]}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted and wanted[0] != "bytes=-":
            size = len(data)
            first = int(wanted[1]) if wanted[1] else max(0, size - int(wanted[2]))
            last = min(int(wanted[2]), size - 1) if wanted[1] and wanted[2] else size - 1
            data, status = data[first : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        self._send(status, data, headers)


def _file_entry(path: str, data: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(data)}
    if path.endswith(LFS_SUFFIXES):
        oid = hashlib.sha256(data).hexdigest()
        return entry | {"oid": oid, "lfs": {"oid": oid, "size": len(data), "pointerSize": 135}}
    return entry | {"oid": _sha1(b"blob %d\0" % len(data) + data)}


def _folder_entry(path: str) -> dict:
    return {"type": "directory", "path": path, "oid": _sha1(path.encode()), "size": 0}


_REPOSITORY = r"(?P<kinds>models|datasets|spaces)/(?P<repo_id>[^/]+/[^/]+)"
_PREFIXED = r"(?P<kinds>datasets/|spaces/|)(?P<repo_id>[^/]+/[^/]+)"
ROUTES = [
    (("GET",), r"/api/whoami-v2", HubRequestHandler.who_am_i),
    (("POST",), r"/api/repos/create", HubRequestHandler.create_repository),
    (("POST",), rf"/api/{_REPOSITORY}/branch/(?P<branch>[^/]+)", HubRequestHandler.create_branch),
    (("POST",), r"/api/validate-yaml", HubRequestHandler.validate_yaml),
    (
        ("POST",),
        rf"/api/{_REPOSITORY}/preupload/(?P<revision>[^/]+)",
        HubRequestHandler.upload_modes,
    ),
    (("POST",), rf"/{_PREFIXED}\.git/info/lfs/objects/batch", HubRequestHandler.lfs_batch),
    (("PUT",), r"/lfs/(?P<oid>[0-9a-f]{64})", HubRequestHandler.lfs_upload),
    (("POST",), rf"/api/{_REPOSITORY}/commit/(?P<revision>[^/]+)", HubRequestHandler.commit),
    (("GET",), rf"/api/{_REPOSITORY}", HubRequestHandler.repository),
    (("GET",), rf"/api/{_REPOSITORY}/revision/(?P<revision>[^/]+)", HubRequestHandler.repository),
    (("GET",), rf"/api/{_REPOSITORY}/refs", HubRequestHandler.references),
    (
        ("GET",),
        rf"/api/{_REPOSITORY}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.*))?",
        HubRequestHandler.tree,
    ),
    (
        ("POST",),
        rf"/api/{_REPOSITORY}/paths-info/(?P<revision>[^/]+)",
        HubRequestHandler.paths_info,
    ),
    (
        ("GET", "HEAD"),
        rf"/{_PREFIXED}/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
        HubRequestHandler.download,
    ),
]
