"""A bucket of Google Cloud Storage on the loopback interface, enough of it to read from.

Enters: a local folder. Leaves: its files as the objects of a bucket `corpus`, over the JSON
API's three reading calls: list, metadata and media with byte ranges. Objects below
`forbidden/` answer 403, as a bucket does whose owner gave no permission.
Source of the calls: cloud.google.com/storage/docs/json_api/v1/objects.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import pathlib
import re
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

BUCKET = "corpus"


class _Handler(http.server.BaseHTTPRequestHandler):
    root: pathlib.Path

    def log_message(self, *_: Any) -> None:
        """Says nothing on standard error."""

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        options = dict(urllib.parse.parse_qsl(query))
        found = re.fullmatch(rf"(?:/download)?/storage/v1/b/{BUCKET}/o(?:/(.+))?", path)
        if found is None:
            return self._answer(404, b"{}")
        name = urllib.parse.unquote(found[1] or "")
        if (name or options.get("prefix", "")).startswith("forbidden/"):
            return self._answer(403, b'{"error": {"message": "no storage.objects.get"}}')
        if not name:
            return self._answer(200, json.dumps(self._list(options)).encode())
        file = self.root / name
        if not file.is_file():
            return self._answer(404, b'{"error": {"message": "No such object"}}')
        if options.get("alt") == "media":
            return self._media(file.read_bytes())
        return self._answer(200, json.dumps(self._metadata(file)).encode())

    def _list(self, options: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = options.get("prefix", ""), options.get("delimiter")
        items, prefixes = [], set()
        for file in sorted(f for f in self.root.rglob("*") if f.is_file()):
            name = file.relative_to(self.root).as_posix()
            rest = name.removeprefix(prefix)
            if not name.startswith(prefix):
                continue
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(self._metadata(file))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def _metadata(self, file: pathlib.Path) -> dict[str, str]:
        stat = file.stat()
        return {
            "kind": "storage#object",
            "bucket": BUCKET,
            "name": file.relative_to(self.root).as_posix(),
            "size": str(stat.st_size),
            "generation": str(stat.st_mtime_ns),
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
        }

    def _media(self, data: bytes) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self._answer(200, data)
        start, stop = int(asked[1]), int(asked[2] or len(data) - 1) + 1
        if start >= len(data):
            return self._answer(416, b"")
        return self._answer(206, data[start:stop])

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # the reader has seen enough
            self.wfile.write(body)


@contextlib.contextmanager
def serving(folder: pathlib.Path) -> Iterator[str]:
    """Serves a folder; gives the address that STORAGE_EMULATOR_HOST wants."""
    handler = type("Handler", (_Handler,), {"root": folder})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
