"""A hub on this machine: what huggingface_hub's client asks of the real one to make, fill, list and read repositories.

With `HubServer()` as a context; `client` lets the real client of this process talk to it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest.mock import patch
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin")


class HubServer:
    """Repositories of models in memory.

    Attributes:
        files: repository -> branch -> path -> content.
        private: repository -> whether it was asked to be private.
        messages: of the commits, in their order.
        tokens: that requests came with.
        refuses: part of a path -> status of the answer to a request for such a path.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []
        self.tokens: set[str] = set()
        self.refuses: dict[str, int] = {}
        self.large: dict[str, bytes] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def commit(self) -> str:
        """The commit that every branch is at."""
        return f"{len(self.messages):040x}"

    def answer(self, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        """Return status, content (bytes, or what becomes JSON) and headers."""
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if parts[:1] != ["api"]:
            return self._of_repository(parts, body)
        if parts[1] == "models":
            return self._of_model("/".join(parts[2:4]), (parts[4:5] or ["revision"])[0], parts[5:], body)
        if parts[1:3] == ["repos", "create"]:
            return self._created(json.loads(body))
        # What else is asked for: who the user is, whether the head of a card is valid.
        return 200, {"type": "user", "name": "me", "errors": [], "warnings": []}, {}

    def _of_model(self, name: str, action: str, rest: list[str], body: bytes) -> tuple[int, Any, dict[str, str]]:
        branches = self.files.get(name)
        if branches is None:
            return 404, {"error": "there is no such repository"}, {"X-Error-Code": "RepoNotFound"}
        if action == "branch":
            existed = rest[0] in branches
            branches.setdefault(rest[0], dict(branches["main"]))
            return (409 if existed else 200), {}, {}
        branch = "main" if not rest or re.fullmatch("[0-9a-f]{40}", rest[0]) else rest[0]
        if branch not in branches:
            return 404, {"error": f"no branch {branch}"}, {"X-Error-Code": "RevisionNotFound"}
        if action == "commit":
            return self._committed(name, branch, body)
        found: Any = {"id": name, "sha": self.commit, "siblings": [{"rfilename": path} for path in branches[branch]]}
        if action == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "lfs" if path.endswith(LARGE) else "regular"} for path in paths]
            found = {"files": [{**mode, "shouldIgnore": False, "oid": None} for mode in modes]}
        elif action == "tree":
            files = branches[branch].items()
            found = [{"type": "file", "path": path, "size": len(text), "oid": sha(text)} for path, text in files]
        return 200, found, {}

    def _created(self, asked: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        url = {"url": f"{self.url}/{name}", "name": name, "id": name}
        if name in self.files:
            return 409, url, {}
        self.files[name] = {"main": {".gitattributes": b""}}
        self.private[name] = bool(asked.get("private") or asked.get("visibility") == "private")
        return 200, url, {}

    def _committed(self, name: str, branch: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        files = self.files[name][branch]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.large[value["oid"]]
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{self.commit}", "commitOid": self.commit}, {}

    def _of_repository(self, parts: list[str], body: bytes) -> tuple[int, Any, dict[str, str]]:
        if parts[0] == "large":
            self.large[parts[1]] = body
            return 200, {}, {}
        name, action, *rest = "/".join(parts[:2]).removesuffix(".git"), *parts[2:]
        if action == "info":
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.url}/large/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}, {}
        branches = self.files.get(name, {})
        content = branches.get(rest[0], branches.get("main", {})).get("/".join(rest[1:]))
        if content is None:
            return 404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"}
        return 200, content, {"ETag": f'"{sha(content)}"', "X-Repo-Commit": self.commit}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def handle_request(self) -> None:
        path = urlsplit(self.path).path
        body = self._body()
        self.hub.tokens.add(self.headers.get("Authorization", "").removeprefix("Bearer "))
        status = next((code for part, code in self.hub.refuses.items() if part in path), None)
        status, content, headers = (status, {"error": "refused"}, {}) if status else self.hub.answer(path, body)
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        if "/lfs/" in path:
            kind = "application/vnd.git-lfs+json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else data)

    do_GET = do_POST = do_PUT = do_HEAD = handle_request

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextmanager
def client(hub: HubServer) -> Iterator[None]:
    """Let huggingface_hub in this process, which the tests keep offline, talk to `hub` and to nothing else."""
    from huggingface_hub import constants
    from transformers import trainer

    # Newer releases of transformers keep one client, which has taken its endpoint when it was made.
    kept = getattr(trainer, "hf_api", None)
    here = patch.object(kept(), "endpoint", hub.url) if kept is not None else nullcontext()
    changes = {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    changes["HUGGINGFACE_CO_URL_TEMPLATE"] = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    with patch.multiple(constants, **changes), here:
        yield


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
