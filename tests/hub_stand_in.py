"""A hub of models on the loopback, which huggingface_hub's own client talks to.

Enters: models as {id: {file: bytes}}. Leaves: an address for HF_ENDPOINT; files that are
asked for, and models that are created and committed. It speaks as much of the hub's
interface as downloading and uploading a model take, large files by Git LFS.
"""

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Mapping

TOKEN = "hf_stand_in"
COMMIT = "c0ffee" + "0" * 34


class Hub:
    """The server; use it with `with`. `models` is what it holds, `asked` all requests."""

    def __init__(self, models: Mapping[str, Mapping[str, bytes]]):
        self.models = {name: dict(files) for name, files in models.items()}
        self.uploads: dict[str, bytes] = {}  # by their SHA-256, until a commit names them
        self.asked: list[str] = []
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def _answer(self, body: object = b"", status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _not_found(self, code: str = "RepoNotFound") -> None:
        self._answer(b"", 404, X_Error_Code=code, X_Error_Message="not found")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    # ------------------------------------------------------------------------ downloading

    def do_GET(self) -> None:
        self.hub.asked.append(f"{self.command} {self.path}")
        path = self.path.split("?")[0]
        if found := re.fullmatch(
            r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/[^/]+)?", path
        ):
            name, what = found.groups()
            if (files := self.hub.models.get(name)) is None:
                return self._not_found()
            if what == "tree":
                entries = [
                    {
                        "type": "file",
                        "path": file,
                        "size": len(data),
                        "oid": hashlib.sha1(data).hexdigest(),
                    }
                    for file, data in files.items()
                ]
                return self._answer(entries, Content_Type="application/json")
            siblings = [{"rfilename": file} for file in files]
            values = {"id": name, "sha": COMMIT, "private": False, "siblings": siblings}
            return self._answer(values, Content_Type="application/json")
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            name, file = found.groups()
            data = self.hub.models.get(name, {}).get(file)
            if data is None:
                return self._not_found("EntryNotFound")
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            return self._answer(data, ETag=etag, X_Repo_Commit=COMMIT)
        return self._not_found()

    do_HEAD = do_GET

    # -------------------------------------------------------------------------- uploading

    def do_POST(self) -> None:
        self.hub.asked.append(f"{self.command} {self.path}")
        body, path = self._body(), self.path.split("?")[0]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(b"", 401, X_Error_Message="Invalid username or password.")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.hub.models.setdefault(name, {})
            return self._answer({"url": f"{self.hub.address}/{name}", "id": name})
        if re.fullmatch(r"/api/models/.+/preupload/.+", path):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith("safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    **entry,
                    "actions": {"upload": {"href": f"{self.hub.address}/up/{entry['oid']}"}},
                }
                for entry in json.loads(body)["objects"]
            ]
            return self._answer({"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/[^/]+", path):
            self._commit(found.group(1), body)
            address = f"{self.hub.address}/{found.group(1)}/commit/{COMMIT}"
            return self._answer({"commitUrl": address, "commitOid": COMMIT})
        return self._not_found()

    def do_PUT(self) -> None:
        data = self._body()
        self.hub.uploads[hashlib.sha256(data).hexdigest()] = data
        self._answer()

    def _commit(self, name: str, lines: bytes) -> None:
        for line in lines.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.hub.models[name][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.hub.models[name][value["path"]] = self.hub.uploads[value["oid"]]
