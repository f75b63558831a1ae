"""A hub on 127.0.0.1: the part of huggingface.co's HTTP interface that a download uses, with faults to order.

Large files are redirected to another host name, as the real hub redirects them to its CDN.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest

from localmoe.hub import partial
from localmoe.hub.verify import demo_directory

REPO = "maker/Tiny-MoE"
COMMIT = "a" * 40
_COUNT = 4
_SHARDS = [f"model-0000{i}-of-0000{_COUNT}.safetensors" for i in range(1, _COUNT + 1)]


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None
    authorization: str | None
    host: str


@dataclass
class FakeHub:
    """The server's content, its faults and its log. Every attribute may be changed between two pulls."""

    files: dict[str, bytes]
    extra_names: list[str] = field(default_factory=list)  # listed, never served
    cuts: dict[str, list[int]] = field(default_factory=dict)  # close the connection after so many bytes of a body
    other_bytes: dict[str, bytes] = field(default_factory=dict)  # sent instead of what is listed
    stall: dict[str, int] = field(default_factory=dict)  # stop after so many bytes until `release`
    release: threading.Event = field(default_factory=threading.Event)
    gated: str | None = None  # "listing" or "files"
    down: bool = False
    ignores_range: bool = False
    info: dict[str, object] = field(default_factory=dict)  # overrides in the listing
    requests: list[Request] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    endpoint: str = ""
    commit: str = COMMIT

    def fetched(self) -> dict[str, list[str | None]]:
        """File name -> the Range header of every request for its body."""
        bodies: dict[str, list[str | None]] = {}
        for request in self.requests:
            name = self._name_of(request)
            if name is not None:
                bodies.setdefault(name, []).append(request.range)
        return bodies

    def _name_of(self, request: Request) -> str | None:
        if request.method != "GET":
            return None
        if request.path.startswith("/cdn/"):
            digest = request.path.removeprefix("/cdn/")
            return next(name for name, data in self.files.items() if sha256(data) == digest)
        name = request.path.rpartition("/")[2]
        return name if "/resolve/" in request.path and not is_lfs(name) else None

    def forget_requests(self) -> None:
        self.requests.clear()
        self.sent.clear()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_lfs(name: str) -> bool:
    return name.endswith(".safetensors")


def digest_of(name: str, data: bytes) -> str:
    return sha256(data) if is_lfs(name) else blob_id(data)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.close_connection = True
        path = unquote(urlsplit(self.path).path)
        headers = self.headers
        if not path.startswith("/cdn/") and "/resolve/" not in path and not path.startswith("/api/models/"):
            return self._answer(404, {})  # what else the client asks (which programs use it) is not our concern
        self.hub.requests.append(
            Request(self.command, path, headers["Range"], headers["Authorization"], headers["Host"].split(":")[0])
        )
        if self.hub.down:
            return self._answer(503, {})
        if path.startswith("/cdn/"):
            digest = path.removeprefix("/cdn/")
            return self._body(next(name for name, data in self.hub.files.items() if sha256(data) == digest), {})
        if match := re.fullmatch(r"/api/models/(.+)/revision/(.+)", path):
            return self._listing(*match.groups())
        if match := re.fullmatch(r"/(.+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(*match.groups())
        raise AssertionError(path)

    def _answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Connection": "close", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _listing(self, repo: str, revision: str) -> None:
        if repo == "maker/Old-Name":
            return self._answer(307, {"Location": f"/api/models/{REPO}/revision/{revision}?blobs=true"})
        if repo != REPO:
            return self._answer(404, {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", "v1", self.hub.commit):
            return self._answer(404, {"X-Error-Code": "RevisionNotFound"})
        if self.hub.gated == "listing":
            return self._answer(403, {"X-Error-Code": "GatedRepo"})
        siblings: list[dict[str, object]] = [{"rfilename": name} for name in self.hub.extra_names]
        for name, data in self.hub.files.items():
            entry: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": blob_id(data)}
            if is_lfs(name):
                entry["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 135}
            siblings.append(entry)
        info = {"id": repo, "modelId": repo, "sha": self.hub.commit, "siblings": siblings} | self.hub.info
        return self._answer(200, {"Content-Type": "application/json"}, json.dumps(info).encode())

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        if repo == "maker/Old-Name":
            return self._answer(307, {"Location": f"/{REPO}/resolve/{revision}/{name}"})
        if self.hub.gated == "files":
            return self._answer(401, {"X-Error-Code": "GatedRepo"})
        if repo != REPO or name not in self.hub.files:
            return self._answer(404, {"X-Error-Code": "EntryNotFound"})
        data = self.hub.files[name]
        headers = {"X-Repo-Commit": self.hub.commit, "ETag": f'"{digest_of(name, data)}"'}
        if not is_lfs(name):
            return self._body(name, headers)
        headers |= {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data))}
        port = self.server.server_address[1]
        return self._answer(302, headers | {"Location": f"http://localhost:{port}/cdn/{sha256(data)}"})

    def _body(self, name: str, headers: dict[str, str]) -> None:
        data = self.hub.other_bytes.get(name, self.hub.files[name])
        start, status = 0, 200
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if match and not self.hub.ignores_range:
            start, status = int(match[1]), 206
            stop = min(len(data), int(match[2]) + 1) if match[2] else len(data)
            headers |= {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
        rest = data[start:stop] if status == 206 else data
        self.send_response(status)
        for key, value in {"Content-Length": str(len(rest)), "Connection": "close", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cuts = self.hub.cuts.get(name, [])
        rest = rest[: cuts.pop(0)] if cuts else rest
        pause = self.hub.stall.get(name, len(rest))
        if pause < len(rest):
            del self.hub.stall[name]
        try:
            self.wfile.write(rest[:pause])
            self.wfile.flush()
            if pause < len(rest):
                self.hub.release.wait(20)
                self.wfile.write(rest[pause:])
        except OSError:  # the client was killed
            return
        self.hub.sent[name] = self.hub.sent.get(name, 0) + len(rest)


def checkpoint_files() -> dict[str, bytes]:
    """A repository: the demo's config and tokenizer, three 3 MB shards, and files that must stay where they are."""
    demo = demo_directory()
    random = np.random.default_rng(7)
    shards = {f"model-0000{i}-of-00003.safetensors": random.bytes(3 << 20) for i in (1, 2, 3)}
    index = {"metadata": {}, "weight_map": {f"t{i}": name for i, name in enumerate(shards)}}
    return {
        "config.json": (demo / "config.json").read_bytes(),
        "tokenizer.json": (demo / "tokenizer.json").read_bytes(),
        "model.safetensors.index.json": json.dumps(index).encode(),
        "LICENSE": b"do as you like\n",
        "modeling_deepseek.py": b"raise SystemExit('remote code ran')\n",
        "pytorch_model.bin": b"a pickle",
        "chat_template.py": b"raise SystemExit\n",
        "figures/plot.safetensors": b"not weights",
        "consolidated.safetensors": b"the same weights in another format",
        **shards,
    }


@pytest.fixture
def server() -> Iterator[FakeHub]:
    """A fake hub that is listening; nothing points at it yet."""
    hub = FakeHub(checkpoint_files())
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        httpd.daemon_threads = True
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        hub.endpoint = f"http://127.0.0.1:{httpd.server_address[1]}"
        yield hub
        hub.release.set()
        httpd.shutdown()
        thread.join()


@pytest.fixture
def hub(server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """The fake hub, with this process's huggingface_hub pointed at it and at an empty cache."""
    from huggingface_hub import constants

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(partial, "RETRY_SECONDS", 0.01)
    return server


@pytest.fixture(scope="session")
def sharded_demo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The demo in four shards, the head in the last. Some FP8 matrices have their scales in the next, as in V3's."""
    from safetensors.torch import load_file, save_file

    directory = tmp_path_factory.mktemp("sharded")
    tensors = load_file(demo_directory() / "model.safetensors")
    parts: list[dict] = [{} for _ in _SHARDS]
    for place, name in enumerate(sorted(tensors, key=lambda name: (name == "lm_head.weight", name))):
        parts[min(_COUNT - 1, _COUNT * place // len(tensors))][name] = tensors[name]
    result = {}
    weight_map = {}
    for shard, part in zip(_SHARDS, parts, strict=True):
        last = sorted(part)[-1]
        if last.endswith("_scale_inv") and shard != _SHARDS[-1]:
            parts[_SHARDS.index(shard) + 1][last] = part.pop(last)
    straddling = "model.layers.3.mlp.experts.3.up_proj.weight_scale_inv"
    home = next(part for part in parts if straddling in part)
    parts[(parts.index(home) + 1) % _COUNT][straddling] = home.pop(straddling)
    for shard, part in zip(_SHARDS, parts, strict=True):
        save_file(part, directory / shard)
        weight_map |= dict.fromkeys(part, shard)
        result[shard] = (directory / shard).read_bytes()
    result["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    for path in demo_directory().iterdir():
        if path.suffix == ".json":
            result[path.name] = path.read_bytes()
    return result


@pytest.fixture(scope="session")
def ordinary(tmp_path_factory: pytest.TempPathFactory, sharded_demo: dict[str, bytes]) -> Path:
    """What an ordinary run makes of `sharded_demo`."""
    from quantize.pipeline import quantize

    root = tmp_path_factory.mktemp("ordinary")
    (root / "source").mkdir()
    for name, data in sharded_demo.items():
        (root / "source" / name).write_bytes(data)
    quantize(root / "source", root / "output", "balanced")
    return root / "output"
