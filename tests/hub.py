"""A Hugging Face hub with one dataset on a loopback port; it drops connections in the middle of a file."""

import hashlib
import http.server
import json
import random
import re
import threading
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "a" * 40


class Hub:
    """Serves the files of `folder` as dataset me/data and breaks off the first `drops` downloads half-way."""

    def __init__(self, folder: Path, drops: int = 0) -> None:
        self.folder, self.drops, self.dropped, self.rng = folder, drops, 0, random.Random(0)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def entries(self) -> list[dict]:
        files = sorted(path for path in self.folder.iterdir() if path.suffix in (".parquet", ".jsonl"))
        return [
            {
                "type": "file",
                "path": path.name,
                "size": path.stat().st_size,
                "oid": hashlib.sha1(path.name.encode()).hexdigest(),
            }
            for path in files
        ]


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", sent: int | None = None, **headers: str) -> None:
        self.send_response(status)
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        for key, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body)), **named}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])
        if sent is not None:
            self.close_connection = True

    def answer_json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        if file := re.fullmatch(r"/datasets/me/data/resolve/\w+/(.*)", path):
            self.send_file(self.hub.folder / file[1])
        elif "/tree/" in path:
            self.answer_json(self.hub.entries())
        elif path.startswith("/api/datasets/me/data"):
            siblings = [{"rfilename": entry["path"]} for entry in self.hub.entries()]
            about = {"id": "me/data", "_id": "1", "sha": COMMIT, "private": False, "gated": False, "disabled": False}
            self.answer_json(about | {"downloads": 0, "likes": 0, "tags": [], "siblings": siblings})
        else:
            self.answer(404)

    def send_file(self, path: Path) -> None:
        if not path.exists():
            self.answer(404, X_Error_Code="EntryNotFound")
            return
        whole, part = path.read_bytes(), re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        body, status, headers = whole, 200, {"ETag": '"x"', "Accept_Ranges": "bytes"}
        if part:
            begin, end = int(part[1]), int(part[2] or len(whole) - 1)
            body, status = whole[begin : end + 1], 206
            headers["Content_Range"] = f"bytes {begin}-{end}/{len(whole)}"
        drop = self.command == "GET" and self.hub.dropped < self.hub.drops and len(body) > 1000
        self.hub.dropped += drop
        self.answer(status, body, len(body) // 2 if drop else None, **headers)
