"""Downloads from the hub, against a server on this machine that speaks as much of its protocol as is needed."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, file_download
from test_model import BASE, ModelConfig, build

import puna
from puna.checkpoint.hub import cache_folder, cached_models, download, find_cached, hub_name
from puna.checkpoint.model_directory import save_model
from puna.checkpoint.registry import find_model, open_model
from puna.errors import CheckpointError, PunaError, UsageError
from puna.tokenizer.tokenizer import Tokenizer

COMMIT = "c0ffee" * 6 + "c0de"
NAME = hub_name("org/tiny")
assert NAME is not None


class Hub(ThreadingHTTPServer):
    """One repository, with what can be wrong with it."""

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.listed = files, dict(files)
        self.status, self.code = 200, ""
        self.commit = COMMIT
        self.location = ""
        self.breaks: list[int] = []
        self.asked: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub  # HTTP/1.0: a connection that is kept would outlive a server that is gone

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, body: bool) -> None:
        hub, path = self.server, self.path.split("?")[0]
        hub.asked.append((self.command, path))
        if hub.status != 200:
            self.send(hub.status, b"{}", body, {"X-Error-Code": hub.code})
        elif path.startswith("/api/models/org/tiny"):
            self.send(
                200, json.dumps({"id": "org/tiny", "sha": hub.commit, "siblings": siblings(hub.listed)}).encode(), body
            )
        elif (name := path.removeprefix(f"/org/tiny/resolve/{hub.commit}/")) in hub.files:
            self.file(name, body)
        else:
            self.send(404, b"", body, {"X-Error-Code": "EntryNotFound"})

    def file(self, name: str, body: bool) -> None:
        hub, content = self.server, self.server.files[name]
        headers = {"ETag": f'"{blob_hash(name, hub.listed[name])}"', "X-Repo-Commit": hub.commit}
        if hub.location and name.endswith(".safetensors"):
            self.send(302, b"", body, {**headers, "Location": hub.location, "X-Linked-Size": str(len(content))})
            return
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut = hub.breaks.pop(0) if body and hub.breaks and name.endswith(".safetensors") else None
        self.send(206 if asked else 200, content[start:], body, headers, cut)

    def send(
        self, status: int, content: bytes, body: bool, headers: dict[str, str] | None = None, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content[:cut])
        if cut is not None:
            self.close_connection = True


def blob_hash(name: str, content: bytes) -> str:
    """SHA-256 of what the hub keeps as a large file, git's hash of the rest."""
    if name.endswith((".safetensors", ".bin")):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def siblings(files: dict[str, bytes]) -> list[dict[str, Any]]:
    rows = []
    for name, content in files.items():
        row: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": blob_hash(name, content)}
        if len(row["blobId"]) == 64:
            row["lfs"] = {"sha256": row["blobId"], "size": len(content), "pointerSize": 130}
            row["blobId"] = "0" * 40
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def model_files(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("tiny")
    save_model(folder, build(ModelConfig(**{**BASE, "vocab_size": 600})), Tokenizer(tokenizer_folder), "fp32", {})
    return {p.name: p.read_bytes() for p in folder.iterdir()} | {
        "pytorch_model.bin": b"a pickle", "original/consolidated.00.pth": b"another", "README.md": b"hello",
    }  # fmt: skip


@pytest.fixture
def hub(model_files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The server, and an empty cache."""
    server = Hub(model_files)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    yield server
    server.shutdown()
    server.server_close()


def test_a_download_is_a_model(hub: Hub, model_files: dict[str, bytes]) -> None:
    """What others put into the cache and what we put there must be found by both, by name and without a network."""
    folder = download(NAME)
    fetched = {p.name for p in folder.iterdir()}
    assert fetched == {n for n in model_files if n not in ("pytorch_model.bin", "README.md") and "/" not in n}
    assert all((folder / n).read_bytes() == model_files[n] for n in fetched)
    assert huggingface_hub.snapshot_download("org/tiny", cache_dir=cache_folder(), local_files_only=True) == str(folder)
    hub.shutdown()
    assert find_model("org/tiny") == find_model(f"org/tiny@{COMMIT}") == find_cached(NAME) == folder
    assert [str(found.name) for found in cached_models()] == ["org/tiny"]
    assert puna.load("org/tiny", dtype="fp32").logits([[1, 2]]).shape == (1, 2, 600)


def test_nothing_is_fetched_twice(hub: Hub) -> None:
    """A second `puna download` of 140 GB must cost a listing."""
    download(NAME)
    hub.asked.clear()
    download(NAME)
    assert [verb for verb, path in hub.asked if "/resolve/" in path and verb == "GET"] == []


def test_pickles_come_when_asked_for(hub: Hub) -> None:
    """`--files` is the only way to them."""
    folder = download(NAME, ["pytorch_model.*", "original/*"])
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == ["consolidated.00.pth", "pytorch_model.bin"]
    with pytest.raises(UsageError, match="no file matches"):
        download(NAME, ["*.gguf"])
    hub.listed = {"pytorch_model.bin": b"a pickle", "config.json": b"{}"}
    with pytest.raises(UsageError, match=r"no weights in safetensors(.|\n)*pytorch_model\.bin"):
        download(NAME)


def test_a_connection_that_breaks_is_resumed(hub: Hub, model_files: dict[str, bytes]) -> None:
    """Beginning again at every break never ends on a bad line; going on at the wrong byte damages the file."""
    hub.breaks = [1000, 5000]
    folder = download(NAME)
    assert (folder / "model.safetensors").read_bytes() == model_files["model.safetensors"]
    assert hub.breaks == []


@pytest.mark.parametrize("change", ["another byte", "shorter", "longer"])
def test_another_content_is_refused(hub: Hub, change: str) -> None:
    """A proxy or a disk that changes one bit makes another model; the next try must not find what this one left."""
    sound = hub.files["model.safetensors"]
    wrong = {"another byte": sound[:-1] + bytes([sound[-1] ^ 1]), "shorter": sound[:-1], "longer": sound + b"x"}[change]
    hub.files = {**hub.files, "model.safetensors": wrong}
    with pytest.raises(CheckpointError, match=r"not the file the hub lists|Consistency check"):
        download(NAME)
    assert find_cached(NAME) is None
    with pytest.raises(CheckpointError, match="puna download org/tiny"):
        open_model("org/tiny")
    hub.files = {**hub.files, "model.safetensors": sound}
    assert open_model(download(NAME)).problems() == []


@pytest.mark.parametrize("where", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://127.0.0.1:1/x"])
def test_a_redirect_to_elsewhere_is_refused(hub: Hub, where: str) -> None:
    """A server must not be able to name a file of this machine as the model's."""
    hub.location = where
    with pytest.raises(CheckpointError, match="cannot be fetched"):
        download(NAME)
    assert not list(cache_folder().rglob("model.safetensors"))


@pytest.mark.parametrize(
    "name",
    ["../../evil", "/etc/evil", "a/../../evil", "..\\evil", "C:\\evil", "C:evil", "a\0b", "a//b", "~/.ssh/x/../y"],
)
def test_file_names_that_climb_are_refused(hub: Hub, name: str, tmp_path: Path) -> None:
    """The hub's list of files is a stranger's text."""
    hub.listed = {**hub.files, name: b"evil"}
    hub.files = hub.listed
    with pytest.raises(CheckpointError, match="lists a file called"):
        download(NAME, ["*"])
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("commit", ["../../../x", "main", ""])
def test_a_commit_that_is_none_is_refused(hub: Hub, commit: str) -> None:
    """The commit becomes the name of a folder."""
    hub.commit = commit
    with pytest.raises(CheckpointError, match="commit"):
        download(NAME)


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [(401, "", "no such model|private"), (404, "RepoNotFound", "no such model|private"),
     (403, "GatedRepo", "licence.*accepted"), (401, "GatedRepo", "licence.*accepted"),
     (404, "RevisionNotFound", "no revision"), (500, "", "cannot be fetched")],
)  # fmt: skip
def test_refusals_say_what_to_do(hub: Hub, status: int, code: str, said: str) -> None:
    """`401 Client Error` tells nobody that a licence has to be accepted."""
    hub.status, hub.code = status, code
    with pytest.raises(CheckpointError, match=said):
        download(NAME)


def test_a_server_that_is_gone(hub: Hub) -> None:
    """No network is the usual case, and no reason for a traceback; what is cached stays usable."""
    folder = download(NAME)
    hub.shutdown()
    hub.server_close()
    with pytest.raises(CheckpointError, match="cannot be fetched"):
        download(NAME)
    assert find_model("org/tiny") == folder


def test_offline_is_respected(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that must not talk says so by this variable; looking a name up never talks at all."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE"):
        download(NAME)
    with pytest.raises(CheckpointError, match="puna download org/tiny"):
        find_model("org/tiny")
    assert hub.asked == []


def test_the_command(hub: Hub, tmp_path: Path) -> None:
    """The verb by itself, with the hub's own variables: it says the size before and prints the folder after."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": ""}
    words = [sys.executable, "-m", "puna", "download", "org/tiny@v1"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "files, 0.00 GB" in done.stderr
    folder = Path(done.stdout.strip())
    assert folder == tmp_path / "home/hub/models--org--tiny/snapshots" / COMMIT
    assert (tmp_path / "home/hub/models--org--tiny/refs/v1").read_text() == COMMIT
    done = subprocess.run([*words[:-1], "../x"], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "not a name of the hub" in done.stderr


@pytest.mark.parametrize(
    "name",
    ["org/..", "../org", "org/../x", "/org/x", "org/x/y", "org", "org//x", "-org/x", "org/x@", "org/x@../..", "o\0rg/x",
     "org/x@a\0", "models--org--tiny/x", "org/%2e%2e", "org/x" * 60, "~/x", "C:\\org/x", "org/x@a//b", "org/x\n"],
)  # fmt: skip
def test_what_is_no_name_of_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name becomes a folder of the cache; one that climbs would open or write another."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    assert hub_name(name) is None
    with pytest.raises(PunaError):
        open_model(name)


def test_a_reference_that_leads_elsewhere_is_not_followed(hub: Hub, tmp_path: Path) -> None:
    """The cache is shared: a `refs/main` with dots in it must not lead out of the snapshots."""
    folder = download(NAME)
    (tmp_path / "cache/models--org--tiny/secret").mkdir()
    for content in ("../secret", "..", ".", "/etc", "a\0b", "\n"):
        (folder.parents[1] / "refs/main").write_text(content)
        assert find_cached(NAME) is None


def test_every_file_of_a_snapshot_is_a_link(hub: Hub, tmp_path: Path) -> None:
    """The cache's links into `blobs` are how it works; the same link to anywhere else is an attack."""
    folder = download(NAME)
    weights = folder / "model.safetensors"
    assert weights.is_symlink()
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(weights.read_bytes())
    weights.unlink()
    weights.symlink_to(secret)
    with pytest.raises(CheckpointError, match="leads outside"):
        open_model("org/tiny")
    (shared := tmp_path / "cache/blobs/ab").mkdir(parents=True)
    secret.rename(shared / "abcd")
    blob = folder.parents[1] / "blobs/efgh"
    blob.symlink_to(shared / "abcd")
    weights.unlink()
    weights.symlink_to(blob)
    assert open_model("org/tiny").load(torch.float32, torch.device("cpu")) is not None
