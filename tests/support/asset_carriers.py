"""Small carriers for tests: wheels, sdists, and a package index on loopback."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from harness.assets.table import Source

ROWS = '{"id": "a", "text": "so good", "label": 1}\n{"id": "b", "text": "so bad", "label": 0}\n'
_METADATA = "Metadata-Version: 2.1\nName: tiny-carrier\nVersion: 1.0\n"
_WHEEL = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def wheel(folder: Path, members: Mapping[str, str | bytes]) -> Path:
    path = folder / "tiny_carrier-1.0-py3-none-any.whl"
    folder.mkdir(parents=True, exist_ok=True)
    about = {"METADATA": _METADATA, "WHEEL": _WHEEL, "RECORD": ""}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**members, **{f"tiny_carrier-1.0.dist-info/{k}": v for k, v in about.items()}}.items():
            archive.writestr(name, content)
    return path


def tar(path: Path, members: Mapping[str, str | bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def sdist(folder: Path, members: Mapping[str, str | bytes], setup: str = "") -> Path:
    top = "tiny-carrier-1.0"
    inside = {"PKG-INFO": _METADATA, "setup.py": setup, **members}
    return tar(folder / f"{top}.tar.gz", {f"{top}/{name}": content for name, content in inside.items()})


def source(carrier: Path, **changes: Any) -> Source:
    scheme = "pip" if carrier.suffix == ".whl" else "sdist"
    row = {
        "name": "tiny",
        "kind": "data",
        "source": f"{scheme}:tiny-carrier==1.0",
        "sha256": hashlib.sha256(carrier.read_bytes()).hexdigest(),
        "bytes": carrier.stat().st_size,
        "member": "tiny_carrier/rows.jsonl",
        "rows": {"format": "jsonl"},
    }
    return Source.model_validate({**row, **changes})


def model_files(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@contextmanager
def index(carrier: Path) -> Iterator[str]:
    """Serve one file as a package index, and yield the URL of the index."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            found = {
                "/simple/tiny-carrier/": f'<a href="/files/{carrier.name}">{carrier.name}</a>'.encode(),
                f"/files/{carrier.name}": carrier.read_bytes(),
            }.get(self.path)
            self.send_response(404 if found is None else 200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(found or b"")))
            self.end_headers()
            self.wfile.write(found or b"")

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/simple"
        finally:
            server.shutdown()
            thread.join()
