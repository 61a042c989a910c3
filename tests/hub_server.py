"""A small stand-in for the Hub: what huggingface_hub 2 really calls, over HTTP on the loopback, in memory.

    with Hub({"hf_writer": "me"}) as hub:
        subprocess.run([...], env=hub.environment("hf_writer", folder))   # HF_ENDPOINT is read at import
        hub.repos["me/plug"].refs["main"]                                 # what is there now
        hub.fail("GET", "/resolve/", status=429, times=1)                 # the next such request fails

Repositories are commits of files by path. What stays out: Xet, spaces, data sets, discussions.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import struct
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlencode, urlsplit


class File(NamedTuple):
    """Content, and whether it is stored as a large file."""

    data: bytes
    is_large: bool

    @property
    def git_oid(self):
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def oid(self):
        return hashlib.sha256(self.data).hexdigest() if self.is_large else self.git_oid


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # branches, tags and refs/pr/N
    messages: dict[str, tuple[str, str]] = field(default_factory=dict)  # of each commit: summary, description

    def commit(self, ref, files, message=("", "")):
        """A new commit on a ref, with all its files. Returns its hash."""
        sha = hashlib.sha1(repr((len(self.commits), sorted(f"{p}{f.oid}" for p, f in files.items()))).encode())
        self.commits[sha.hexdigest()], self.messages[sha.hexdigest()] = files, message
        self.refs[ref] = sha.hexdigest()
        return sha.hexdigest()

    def add(self, folder, ref="main", prefix=""):
        """Commit the files of a local folder beside those that are there."""
        files = dict(self.commits.get(self.refs.get(ref, ""), {}))
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                name = prefix + path.relative_to(folder).as_posix()
                files[name] = File(path.read_bytes(), name.endswith(".safetensors"))
        return self.commit(ref, files)

    def files(self, ref="main"):
        return self.commits[self.refs.get(ref, ref)]


@dataclass
class Fault:
    method: str
    pattern: str
    times: int
    status: int
    headers: dict[str, str]
    cut: int | None  # do as told, answer that many bytes, then hang up
    how: str  # does it hang up: "quietly", with a "reset", or as if that were "all"
    hang: threading.Event | None  # set once the request has come; it is never answered


class Hub:
    """The server. `users` gives the account of each token; tokens that end in `_read` may not write."""

    part_size = 1 << 16  # larger files are uploaded in parts of so many bytes

    def __init__(self, users):
        self.users = users
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}  # by sha256
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, str]] = []  # method, path, Range
        self.authorised: list[tuple[str, str, str]] = []  # method, path, token
        self.yaml_errors: list[str] = []  # what the Hub has against every card
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.storage = (
            f"http://localhost:{self._server.server_port}"  # of large files: another host, as on the real Hub
        )

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()

    def environment(self, token, home, **more):
        """Of a process that takes this for the Hub."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        own = {"HF_ENDPOINT": self.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
        own |= {"HF_TOKEN": token} if token else {}
        own |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        return {**kept, **own, **more}

    def repo(self, name, **kind):
        """A new repository with one commit."""
        repo = self.repos[name] = Repo(**kind)
        repo.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)})
        return repo

    def fail(self, method, pattern, *, status=500, times=1000, headers=None, cut=None, how="quietly", hang=None):
        """Answer the next requests that match otherwise."""
        self.faults.append(Fault(method, pattern, times, status, headers or {}, cut, how, hang))

    def fault(self, method, path):
        with self.lock:
            for fault in self.faults:
                if fault.times and method == fault.method and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None


class _Refused(Exception):
    def __init__(self, status, code="", message=""):
        self.status, self.headers = status, {}
        if code:
            self.headers["X-Error-Code"] = code
        if message:
            self.headers["X-Error-Message"] = message


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do(self):
        self.path, _, query = self.path.partition("?")
        self.query = parse_qs(query)
        length = int(self.headers.get("Content-Length") or 0)
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            self.body = b""
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            self.body = self.rfile.read(length)
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.hub.requests.append((self.command, self.path, self.headers.get("Range") or ""))
        self.hub.authorised.append((self.command, self.path, self.token))
        self.broken = self.hub.fault(self.command, self.path)
        if self.broken and self.broken.hang:
            self.broken.hang.set()
            threading.Event().wait(60)
        if self.broken and self.broken.cut is None:
            return self.send(b"{}", self.broken.status, self.broken.headers)
        try:
            self.route()
        except _Refused as refused:
            self.send(b'{"error": "refused"}', refused.status, refused.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do

    def send(self, data, status=200, headers=None, length=None):
        cut = self.broken.cut if self.broken else None
        if self.broken and self.broken.how == "all":
            length = min(cut, len(data))
        if cut == 0:
            return self.hang_up()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if cut is None else data[:cut])
        if cut is not None:
            self.hang_up()

    def hang_up(self):
        self.close_connection = True
        if self.broken.how == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close(), self.wfile.close(), self.connection.close()

    def answer(self, content, status=200):
        self.send(json.dumps(content).encode(), status, {"Content-Type": "application/json"})

    # ---- who may do what -------------------------------------------------------------------------------------

    def user(self):
        if self.token and self.token not in self.hub.users:
            raise _Refused(401, message="Invalid credentials in Authorization header")
        return self.hub.users.get(self.token)

    def repo(self, name, write=False):
        user, repo = self.user(), self.hub.repos.get(name)
        owns = user is not None and name.startswith(f"{user}/")
        if repo is None or (repo.private and not owns):
            raise _Refused(404 if user else 401, "RepoNotFound" if user else "")
        if repo.gated and not owns:
            raise _Refused(403, "GatedRepo", "Access to this model is restricted")
        if write and (not owns or self.token.endswith("_read")):
            raise _Refused(403 if user else 401, message="You don't have the rights")
        return repo

    @staticmethod
    def commit_of(repo, revision):
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            raise _Refused(404, "RevisionNotFound")
        return sha

    # ---- what is asked ---------------------------------------------------------------------------------------

    def route(self):
        path = self.path
        if path == "/api/whoami-v2":
            if self.user() is None:
                raise _Refused(401, message="Invalid username or password.")
            return self.answer({"type": "user", "name": self.user(), "auth": {"type": "access_token"}, "orgs": []})
        if path == "/api/repos/create":
            return self.create()
        if path == "/api/validate-yaml":
            errors = [{"message": error} for error in self.hub.yaml_errors]
            return self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/([^/]+)(?:/([^/]+)(?:/(.+))?)?)?", path):
            name, action, revision, rest = found.groups()
            return self.api(name, action, unquote(revision or "main"), unquote(rest or ""))
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.batch(found[1])
        if path.startswith("/large/"):
            return self.large(*path.split("/")[2:])
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(found[1], unquote(found[2]), unquote(found[3]))
        raise _Refused(404)

    def create(self):
        asked, user = json.loads(self.body), self.user()
        owner = asked.get("organization") or user
        if user is None:
            raise _Refused(401, message="Invalid username or password.")
        if owner != user or self.token.endswith("_read"):
            raise _Refused(403, message="You don't have the rights")
        name = f"{owner}/{asked['name']}"
        if name in self.hub.repos:
            return self.answer({"url": f"{self.hub.endpoint}/{name}"}, 409)
        self.hub.repo(name, private=asked.get("visibility") == "private")
        return self.answer({"url": f"{self.hub.endpoint}/{name}", "id": name})

    def api(self, name, action, revision, rest):
        write = action in ("branch", "tag", "preupload", "commit")
        repo = self.repo(name, write=write and "create_pr" not in self.query)
        if action == "branch":
            if revision in repo.refs:
                raise _Refused(409)
            start = json.loads(self.body or "{}").get("startingPoint", "main")
            repo.refs[revision] = self.commit_of(repo, start)
            return self.answer({})
        if action == "tag":
            repo.refs[json.loads(self.body)["tag"]] = self.commit_of(repo, revision)
            return self.answer({})
        sha = self.commit_of(repo, revision)
        if action in (None, "revision"):
            siblings = [{"rfilename": path} for path in repo.commits[sha]]
            return self.answer({"id": name, "sha": sha, "private": repo.private, "tags": [], "siblings": siblings})
        if action == "tree":
            return self.tree(repo.commits[sha], rest)
        if action == "preupload":
            return self.preupload(repo.commits[sha])
        if action == "commit":
            return self.commit(name, repo, revision)
        raise _Refused(404)

    def tree(self, files, folder):
        """A listing, in pages of two."""
        prefix = folder and folder.rstrip("/") + "/"
        inside = {path: file for path, file in files.items() if path.startswith(prefix)}
        if prefix and not inside:
            raise _Refused(404, "EntryNotFound")
        lines = {path: entry(path, file) for path, file in inside.items()}
        if self.query.get("recursive", ["false"])[0].lower() != "true":
            folders = {prefix + path[len(prefix) :].split("/")[0] for path in inside if "/" in path[len(prefix) :]}
            lines = {path: line for path, line in lines.items() if "/" not in path[len(prefix) :]}
            lines |= {path: {"type": "directory", "path": path, "oid": "0" * 40} for path in folders}
        start = int(self.query.get("cursor", ["0"])[0])
        headers = {"Content-Type": "application/json"}
        if start + 2 < len(lines):
            query = {key: values[0] for key, values in self.query.items()} | {"cursor": str(start + 2)}
            headers["Link"] = f'<{self.hub.endpoint}{self.path}?{urlencode(query)}>; rel="next"'
        self.send(json.dumps(list(lines.values())[start : start + 2]).encode(), 200, headers)

    def preupload(self, present):
        modes = []
        for asked in json.loads(self.body)["files"]:
            mode = "lfs" if asked["path"].endswith(".safetensors") or asked["size"] > 1 << 20 else "regular"
            oid = present[asked["path"]].oid if asked["path"] in present else None
            modes.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": modes})

    def commit(self, name, repo, revision):
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        files = dict(repo.commits[self.commit_of(repo, revision)])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    raise _Refused(400, message="a large file was never uploaded")
                files[value["path"]] = File(self.hub.large[value["oid"]], True)
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        number = sum(ref.startswith("refs/pr/") for ref in repo.refs) + 1
        ref = f"refs/pr/{number}" if "create_pr" in self.query else revision
        sha = repo.commit(ref, files, (header["summary"], header["description"]))
        page = f"{self.hub.endpoint}/{name}"
        pull_request = f"{page}/discussions/{number}" if "create_pr" in self.query else None
        self.answer({"commitUrl": f"{page}/commit/{sha}", "commitOid": sha, "pullRequestUrl": pull_request})

    # ---- large files -----------------------------------------------------------------------------------------

    def batch(self, name):
        self.repo(name)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            oid, size, url = asked["oid"], asked["size"], f"{self.hub.endpoint}/large/{asked['oid']}"
            upload: dict = {"href": url}
            if size > self.hub.part_size:
                parts = -(-size // self.hub.part_size)
                upload["header"] = {"chunk_size": str(self.hub.part_size)}
                upload["header"] |= {str(i): f"{url}/{i}" for i in range(1, parts + 1)}
            actions = {"upload": upload, "verify": {"href": f"{url}/verify"}}
            objects.append({"oid": oid, "size": size, **({} if oid in self.hub.large else {"actions": actions})})
        self.answer({"transfer": "basic", "objects": objects})

    def large(self, oid, part=None):
        hub = self.hub
        if self.command in ("GET", "HEAD"):
            return self.content(hub.large[oid], {"ETag": f'"{oid}"'})
        if part == "verify":
            if oid not in hub.large:
                raise _Refused(404)
            return self.answer({})
        if self.command == "PUT" and part is not None:
            hub.parts.setdefault(oid, {})[int(part)] = self.body
            return self.send(b"", headers={"ETag": f'"{part}"'})
        data = self.body
        if self.command == "POST":  # all parts are there
            parts = hub.parts[oid]
            data = b"".join(parts[part["partNumber"]] for part in json.loads(self.body)["parts"])
        if hashlib.sha256(data).hexdigest() != oid:
            raise _Refused(400, message="content and oid differ")
        hub.large[oid] = data
        return self.answer({})

    def resolve(self, name, revision, path):
        repo = self.repo(name)
        sha = self.commit_of(repo, revision)
        headers = {"X-Repo-Commit": sha}
        if path not in repo.commits[sha]:
            refused = _Refused(404, "EntryNotFound")
            refused.headers |= headers
            raise refused
        file = repo.commits[sha][path]
        headers["ETag"] = f'"{file.git_oid}"'
        if not file.is_large:
            return self.content(file.data, headers)
        self.hub.large[file.oid] = file.data
        headers |= {"X-Linked-ETag": f'"{file.oid}"', "X-Linked-Size": str(len(file.data))}
        self.send(b"", 302, {**headers, "Location": f"{self.hub.storage}/large/{file.oid}"})

    def content(self, data, headers):
        headers = {**headers, "Accept-Ranges": "bytes"}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, stop = int(asked[1]), int(asked[2]) + 1 if asked[2] else len(data)
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            return self.send(data[start:stop], 206, headers)
        return self.send(data, 200, headers)


def entry(path, file):
    """A line of a listing."""
    listed = {"type": "file", "path": path, "size": len(file.data), "oid": file.git_oid}
    return listed | ({"lfs": {"oid": file.oid, "size": len(file.data), "pointerSize": 134}} if file.is_large else {})


def loopback_only():
    """From now on this process cannot reach anything but itself."""
    connect = socket.socket.connect

    def guarded(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a connection to {urlsplit('//' + address[0]).hostname}")
        return connect(self, address)

    socket.socket.connect = guarded
