"""A Hugging Face Hub of one process, in memory, for tests over real HTTP with the real clients. Standard library only.

    with FakeHub() as hub, ClientProcess(hub.environment(tmp_path)) as client:
        client(publish, "anna/student")  # `publish` runs in a process that was started with HF_ENDPOINT set
        assert "model_index.json" in hub.files("anna/student")

It knows what `huggingface_hub`, `diffusers` and `datasets` ask for: repositories, branches, tags and commits, trees,
files (large ones by LFS, behind a redirect), model-card checks and who a token belongs to. It has no Xet storage.
"""

import base64
import hashlib
import json
import multiprocessing
import os
import re
import socket
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

LFS_SUFFIXES = (".arrow", ".bin", ".jpg", ".parquet", ".png", ".safetensors")
LICENSES = ("apache-2.0", "cc-by-4.0", "mit", "other")
REPO = r"/(?P<kind>model|dataset)s/(?P<repo_id>[^/]+/[^/]+)"
FILES = r"(/(?P<kind>dataset)s)?/(?P<repo_id>[^/]+/[^/]+)"
_ROUTES = []


def route(method: str, pattern: str):
    """Register a method of the request handler: the pattern's named groups are its arguments, unquoted."""

    def register(function):
        _ROUTES.append((method.split(), re.compile(pattern + "/?$"), function))
        return function

    return register


class HubError(Exception):
    """An answer other than 2xx, with the headers by which clients tell errors apart."""

    def __init__(self, status: int, message: str, code: str = "", **body):
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


class Repo:
    """Commits of whole trees, path to content, and the branches and tags that name them."""

    def __init__(self, kind: str, repo_id: str, private: bool):
        self.kind, self.repo_id, self.private = kind, repo_id, private
        self.commits, self.history, self.tags = {}, [], {}
        self.branches = {"main": self.add_commit({}, "initial commit")}

    def add_commit(self, files: dict[str, bytes], title: str) -> str:
        oid = hashlib.sha1(f"{self.repo_id} {len(self.history)} {title}".encode()).hexdigest()
        self.commits[oid] = files
        self.history.append((oid, title))
        return oid

    def resolve(self, revision: str) -> str:
        for oid in (self.branches.get(revision), self.tags.get(revision), revision):
            if oid in self.commits:
                return oid
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


class FakeHub:
    """The server; `with FakeHub() as hub` starts and stops it.

    Attributes:
        url: of the server.
        tokens: token to (user name, "write" | "read" | "expired"); change it at will.
        requests: (method, path, headers with lower-case names) of every request so far.
        page_size: entries of one page of a tree.
    """

    def __init__(self):
        self.tokens = {
            "hf_anna_may_write": ("anna", "write"),
            "hf_anna_may_read": ("anna", "read"),
            "hf_anna_too_late": ("anna", "expired"),
            "hf_bob_may_write": ("bob", "write"),
        }
        self.requests, self.page_size = [], 1000
        self.repos, self.lfs, self.cuts, self.lock = {}, {}, {}, threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.server.daemon_threads, self.server.hub = True, self
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.cdn = f"http://localhost:{self.server.server_port}"  # another host: tokens must not follow there

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home, token: str | None = "hf_anna_may_write") -> dict[str, str]:
        """Return the environment of a client process that knows this Hub alone and keeps its files below `home`."""
        keep = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        keep |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
        keep |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        keep |= {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
        return keep | ({"HF_TOKEN": token} if token else {})

    def add_repo(self, repo_id: str, files: dict[str, bytes], kind: str = "model", private: bool = False) -> Repo:
        """Put a repository there with its files, as if they had been published."""
        repo = self.repos[kind, repo_id] = Repo(kind, repo_id, private)
        repo.branches["main"] = repo.add_commit(dict(files), "Upload files")
        return repo

    def files(self, repo_id: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """Return path to content of a repository; KeyError if there is none."""
        repo = self.repos[kind, repo_id]
        return repo.commits[repo.resolve(revision)]

    def cut(self, method: str, after_bytes: int | None) -> None:
        """Close the connection after that many bytes of each large body: "PUT" of a file into LFS, "POST" of a
        commit, or "GET" of a file out of LFS. None: no more.
        """
        self.cuts[method] = after_bytes


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def handle_request(self):
        self.hub, url = self.server.hub, urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        headers = {key.lower(): value for key, value in self.headers.items()}
        self.hub.requests.append((self.command, self.path, headers))
        try:
            self.body = self.read_body(cut="/commit/" in url.path or url.path.startswith("/lfs/"))
            self.user, self.role = self.authenticate()
            for methods, pattern, function in _ROUTES:
                match = pattern.match(url.path)
                if match and self.command in methods:
                    named = {key: unquote(value) for key, value in match.groupdict().items() if value}
                    with self.hub.lock:
                        answer = function(self, **named)
                    return self.answer(*answer) if isinstance(answer, tuple) else self.answer(200, answer)
            raise HubError(404, "Sorry, we can't find the page you are looking for.")
        except HubError as error:
            self.answer(error.status, error.body, error.headers)
        except ConnectionError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def read_body(self, cut: bool) -> bytes:
        size, limit = int(self.headers.get("Content-Length", 0)), self.hub.cuts.get(self.command) if cut else None
        body = self.rfile.read(size if limit is None else min(size, limit))
        if len(body) < size:
            self.hang_up()
        return body

    def hang_up(self):
        self.connection.shutdown(socket.SHUT_RDWR)
        raise ConnectionAbortedError

    def answer(self, status: int, content=b"", headers=None):
        """Send JSON or bytes, but for a HEAD nothing after the headers."""
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": len(content), **(headers or {})}.items():
            self.send_header(key, str(value))
        self.end_headers()
        limit = self.hub.cuts.get("GET") if self.path.startswith("/cdn/") else None
        if self.command != "HEAD":
            self.wfile.write(content if limit is None else content[:limit])
            if limit is not None and limit < len(content):
                self.hang_up()

    # --- who may do what --------------------------------------------------------------------------------------

    def authenticate(self) -> tuple[str | None, str | None]:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:
            return None, None
        if token not in self.hub.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        user, role = self.hub.tokens[token]
        if role == "expired":
            raise HubError(401, "User Access Token is expired")
        return user, role

    def find(self, kind: str, repo_id: str, write: bool = False) -> Repo:
        repo, owner = self.hub.repos.get((kind, repo_id)), repo_id.split("/")[0]
        if repo is None or (repo.private and self.user != owner):
            if self.user is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        if write:
            self.check_writer(owner, kind)
        return repo

    def check_writer(self, owner: str, kind: str):
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        if self.user != owner or self.role != "write":
            raise HubError(403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')

    # --- repositories -----------------------------------------------------------------------------------------

    @route("GET", "/api/whoami-v2")
    def whoami(self):
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        token = {"accessToken": {"displayName": "test", "role": self.role}}
        return {"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token", **token}}

    @route("POST", "/api/repos/create")
    def create_repo(self):
        asked = json.loads(self.body)
        kind, owner, name = asked.get("type") or "model", asked.get("organization") or self.user, asked["name"]
        self.check_writer(owner, kind)
        if not re.fullmatch(r"[\w.-]{1,96}", name) or re.search(r"\.\.|--|^[.-]|[.-]$|\.git$", name):
            raise HubError(400, f'Invalid repo name: "{owner}/{name}"')
        repo_id, folder = f"{owner}/{name}", "" if kind == "model" else f"{kind}s/"
        described = {"url": f"{self.hub.url}/{folder}{repo_id}", "name": repo_id}
        if (kind, repo_id) in self.hub.repos:
            raise HubError(409, f"You already created this {kind} repo", **described)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repos[kind, repo_id] = Repo(kind, repo_id, private)
        return described

    @route("GET", f"/api{REPO}(/revision/(?P<revision>[^/]+))?")
    def repo_info(self, kind, repo_id, revision=None):
        repo = self.find(kind, repo_id)
        oid = repo.resolve(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(repo.commits[oid])]
        info = {"id": repo_id, "sha": oid, "private": repo.private, "author": repo_id.split("/")[0]}
        dates = {"createdAt": "2026-01-01T00:00:00.000Z", "lastModified": "2026-01-01T00:00:00.000Z"}
        return {**info, **dates, "tags": [], "downloads": 0, "likes": 0, "gated": False, "siblings": siblings}

    @route("GET", f"/api{REPO}/refs")
    def refs(self, kind, repo_id):
        repo, answer = self.find(kind, repo_id), {"converts": []}
        for key, folder, refs in (("branches", "heads", repo.branches), ("tags", "tags", repo.tags)):
            named = [(name, oid) for name, oid in refs.items() if not name.startswith("refs/")]
            answer[key] = [{"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": oid} for n, oid in named]
        return answer

    @route("POST", f"/api{REPO}/(?P<ref>branch|tag)/(?P<name>[^/]+)")
    def create_ref(self, kind, repo_id, ref, name):
        repo, asked = self.find(kind, repo_id, write=True), json.loads(self.body)
        refs, start = repo.branches, asked.get("startingPoint", "main")
        if ref == "tag":  # here the path names the revision
            refs, name, start = repo.tags, asked["tag"], name
        if name in refs:
            raise HubError(409, f"Reference already exists: {name}")
        refs[name] = repo.resolve(start)
        return {}

    # --- files ------------------------------------------------------------------------------------------------

    @route("GET", f"/api{REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.*))?")
    def tree(self, kind, repo_id, revision, folder=None):
        repo = self.find(kind, repo_id)
        files = repo.commits[repo.resolve(revision)]
        inside, entries = f"{folder}/" if folder else "", {}
        for path, content in sorted(files.items()):
            if not path.startswith(inside):
                continue
            for slash in re.finditer("/", path[len(inside) :]):
                parent = path[: len(inside) + slash.start()]
                entries[parent] = _describe_folder(parent)
            entries[path] = _describe(path, content)
        if folder and not entries:
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        if self.query.get("recursive") != "true":
            entries = {path: entry for path, entry in entries.items() if "/" not in path[len(inside) :]}
        start = int(self.query.get("cursor", 0))
        stop, headers = start + self.hub.page_size, {}
        if stop < len(entries):
            query = urlencode({**self.query, "cursor": stop})
            headers["Link"] = f'<{self.hub.url}{urlsplit(self.path).path}?{query}>; rel="next"'
        return 200, list(entries.values())[start:stop], headers

    @route("POST", f"/api{REPO}/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, kind, repo_id, revision):
        repo, asked = self.find(kind, repo_id), parse_qs(self.body.decode())
        files, found = repo.commits[repo.resolve(revision)], []
        for path in asked.get("paths", []):
            if path in files:
                found.append(_describe(path, files[path]))
            elif any(file.startswith(f"{path}/") for file in files):
                found.append(_describe_folder(path))
        return found

    @route("GET HEAD", f"{FILES}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, repo_id, revision, path, kind="model"):
        repo = self.find(kind, repo_id)
        oid = repo.resolve(revision)
        if path not in repo.commits[oid]:
            raise HubError(404, "Entry not found", "EntryNotFound")
        content = repo.commits[oid][path]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{_etag(path, content)}"', "Accept-Ranges": "bytes"}
        if not path.endswith(LFS_SUFFIXES):
            return self.send_range(content, headers)
        key = hashlib.sha256(content).hexdigest()
        self.hub.lfs[key] = content
        linked = {"X-Linked-ETag": f'"{key}"', "X-Linked-Size": len(content)}
        return 302, b"", {**headers, **linked, "Location": f"{self.hub.cdn}/cdn/{key}"}

    @route("GET HEAD", "/cdn/(?P<key>[0-9a-f]{64})")
    def download(self, key):
        return self.send_range(self.hub.lfs[key], {"ETag": f'"{key}"', "Accept-Ranges": "bytes"})

    def send_range(self, content: bytes, headers: dict):
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return 200, content, headers
        start, stop = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1) + 1
        if start >= len(content):
            raise HubError(416, "Range not satisfiable")
        return 206, content[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}

    # --- publishing -------------------------------------------------------------------------------------------

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self):
        license = re.search(r"^license: *(\S+)", json.loads(self.body)["content"], re.MULTILINE)
        if license and license[1] not in LICENSES:
            raise HubError(400, f'"license" must be one of {list(LICENSES)}', errors=[], warnings=[])
        return {"errors": [], "warnings": []}

    @route("POST", f"/api{REPO}/preupload/(?P<revision>[^/]+)")
    def preupload(self, kind, repo_id, revision):
        repo = self.find(kind, repo_id, write=True)
        there, answers = repo.commits[repo.resolve(revision)], []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            answer = {"path": path, "uploadMode": "lfs" if path.endswith(LFS_SUFFIXES) else "regular"}
            answer["oid"] = _etag(path, there[path]) if path in there else None
            answers.append({**answer, "shouldIgnore": False})
        return {"files": answers}

    @route("POST", rf"{FILES}\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo_id, kind="model"):
        self.find(kind, repo_id, write=True)
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.hub.lfs:
                href = f"{self.hub.url}/lfs/{item['oid']}"
                item["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        return {"transfer": "basic", "objects": objects}

    @route("PUT", "/lfs/(?P<key>[0-9a-f]{64})")
    def lfs_upload(self, key):
        if hashlib.sha256(self.body).hexdigest() != key:
            raise HubError(400, "The content does not have this SHA-256")
        self.hub.lfs[key] = self.body
        return {}

    @route("POST", "/lfs/(?P<key>[0-9a-f]{64})/verify")
    def lfs_verify(self, key):
        if len(self.hub.lfs.get(key, b"")) != json.loads(self.body)["size"]:
            raise HubError(422, "The upload is not complete")
        return {}

    @route("POST", f"/api{REPO}/commit/(?P<revision>[^/]+)")
    def commit(self, kind, repo_id, revision):
        repo = self.find(kind, repo_id, write=True)
        head, lines = repo.resolve(revision), [json.loads(line) for line in self.body.splitlines()]
        files, header = dict(repo.commits[head]), lines[0]["value"]
        if header.get("parentCommit") not in (None, head):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    raise HubError(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value["path"]] = self.hub.lfs[value["oid"]]
            else:  # deletedFile or deletedFolder
                gone = [path for path in files if path == value["path"] or path.startswith(f"{value['path']}/")]
                files = {path: content for path, content in files.items() if path not in gone}
        answer = {}
        if self.query.get("create_pr"):
            revision = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in repo.branches)}"
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{revision.rsplit('/')[-1]}"
        elif revision not in repo.branches:
            raise HubError(403, f"Only a branch takes commits, not {revision}")
        repo.branches[revision] = oid = repo.add_commit(files, header["summary"])
        return {**answer, "success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}"}


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _etag(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if path.endswith(LFS_SUFFIXES) else _git_oid(content)


def _describe(path: str, content: bytes) -> dict:
    entry = {"type": "file", "path": path, "oid": _git_oid(content), "size": len(content)}
    if path.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": _etag(path, content), "size": len(content), "pointerSize": 134}
    return entry


def _describe_folder(path: str) -> dict:
    return {"type": "directory", "path": path, "oid": _git_oid(path.encode()), "size": 0}


class ClientError(Exception):
    """An exception of the client process: its type's name, a colon and its message."""


class ClientProcess:
    """A process with an environment of its own, which the libraries read once, when they are imported.

    Calling it with a function of a module's top level and its arguments runs that function there. Waiting between
    two tries of a request is cut short.
    """

    def __init__(self, environment: dict[str, str]):
        spawn = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_set_up, initargs=(environment,))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.pool.shutdown()

    def __call__(self, function, *args, **kwargs):
        error, result = self.pool.submit(_attempt, function, args, kwargs).result()
        if error:
            raise ClientError(error)
        return result


def _set_up(environment):
    os.environ.clear()
    os.environ.update(environment)
    time.sleep = lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01))


def _attempt(function, args, kwargs):
    try:
        return None, function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}", None
