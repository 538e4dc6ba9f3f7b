"""A hub of models on this machine: of the hub's HTTP interface what its own client calls for us."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_tests"


class Hub:
    """What is stored: models by name, each a list of commits, each a dict from path to bytes."""

    def __init__(self):
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.private: set[str] = set()
        self.requests: list[str] = []

    def at(self, name, revision):
        """The commit (hash, files) of a branch or a hash, None where there is none."""
        commits = self.commits[name]
        if revision == "main":
            return commits[-1]
        return next((commit for commit in commits if commit[0] == revision), None)

    def commit(self, name, files):
        before = self.commits[name][-1][1] if self.commits.get(name) else {}
        number = len(self.commits.get(name, ()))
        sha = hashlib.sha1(f"{name} {number}".encode()).hexdigest()
        self.commits.setdefault(name, []).append((sha, {**before, **files}))
        return sha


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers = {"Content-Length": str(len(data)), **headers}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def handle_one(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if path == "/api/repos/create":
            return self.create(json.loads(body), known)
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        kinds = "revision|tree|preupload|commit"
        found = re.fullmatch(rf"/api/models/([^/]+/[^/]+)/({kinds})/([^/]+)", path)
        resolved = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        name = (found or resolved)[1] if found or resolved else None
        if name not in self.hub.commits or (name in self.hub.private and not known):
            return self.answer(401, {"error": "no such model"}, X_Error_Code="RepoNotFound")
        if resolved:
            return self.file(name, resolved[2], resolved[3])
        kind, revision = found[2], found[3]
        if kind == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if kind == "commit":
            return self.take(name, body, known)
        commit = self.hub.at(name, revision)
        if commit is None:
            return self.answer(404, {"error": "none"}, X_Error_Code="RevisionNotFound")
        sha, files = commit
        if kind == "revision":
            return self.answer(200, {"id": name, "modelId": name, "sha": sha, "siblings": []})
        listed = [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in files.items()
        ]
        return self.answer(200, listed)

    do_GET = do_HEAD = do_POST = handle_one  # noqa: N815

    def create(self, wanted, known):
        if not known:
            return self.answer(401, {"error": "who are you?"})
        name = f"{wanted['organization']}/{wanted['name']}"
        url = f"http://{self.headers['Host']}/{name}"
        if name in self.hub.commits:
            return self.answer(409, {"error": "it exists", "url": url})
        if wanted.get("private") or wanted.get("visibility") == "private":
            self.hub.private.add(name)
        self.hub.commit(name, {".gitattributes": b""})
        return self.answer(200, {"url": url, "name": name})

    def take(self, name, body, known):
        if not known:
            return self.answer(403, {"error": "not yours"})
        rows = [json.loads(line) for line in body.decode().splitlines()]
        files = {
            row["value"]["path"]: base64.b64decode(row["value"]["content"])
            for row in rows
            if row["key"] == "file"
        }
        sha = self.hub.commit(name, files)
        url = f"http://{self.headers['Host']}/{name}/commit/{sha}"
        return self.answer(200, {"commitUrl": url, "commitOid": sha, "success": True})

    def file(self, name, revision, path):
        commit = self.hub.at(name, revision)
        if commit is None:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if path not in commit[1]:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit[0])
        data = commit[1][path]
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        return self.answer(200, data, ETag=etag, X_Repo_Commit=commit[0])


@contextmanager
def running_hub():
    """The hub and its address, while it answers."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
