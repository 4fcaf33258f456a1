"""Hub ids: huggingface_hub itself against a hub of this machine, and its cache without any network."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from megatron_syne.convert.hub import hub_origin, resolve_hub_id
from megatron_syne.errors import MissingInput

pytest.importorskip("huggingface_hub")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_" + "Q" * 34
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "tokenizer.model": b"pieces",
    "LICENSE": b"the licence",
    "USE_POLICY.md": b"the policy",
    "README.md": b"not asked for",
    "pytorch_model.bin": b"a pickle",
    "modeling.py": b"code",
    "consolidated.safetensors": b"the same weights again",
    "original/params.json": b"{}",
}
FETCHED = {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer.model",
    "LICENSE",
    "USE_POLICY.md",
}


class Hub(BaseHTTPRequestHandler):
    """What the hub answers to ``snapshot_download``: the list of files, then each file."""

    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        type(self).asked.append(f"{self.command} {self.path}")
        parts = self.path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.list(parts[3], parts[5] if len(parts) > 5 else "main")
        elif parts[1] == "good" and parts[2:4] == ["resolve", COMMIT]:
            content = FILES["/".join(parts[4:])]
            digest = hashlib.sha256(content).hexdigest()
            self.reply(
                200, content if body else b"", {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT}, len(content)
            )
        else:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})

    def list(self, model: str, revision: str) -> None:
        files = {"good": FILES, "pickles": {"pytorch_model.bin": b""}}.get(model)
        if model == "gated":
            self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif model == "broken":
            self.reply(500, b"out of order", {})
        elif files is None:
            self.reply(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", "v1", COMMIT):
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            siblings = [{"rfilename": name} for name in files]
            self.reply(
                200, json.dumps({"id": f"org/{model}", "sha": COMMIT, "siblings": siblings}).encode(), {}
            )

    def reply(self, status: int, content: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def hub() -> Iterator[str]:
    """Address of a hub with the models org/good, org/gated, org/pickles and org/broken."""
    Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def resolve(tmp_path: Path, endpoint: str, name: str, revision: str | None = None, **env: str) -> str:
    """The folder or the error of ``resolve_hub_id`` in a process of its own: the hub's address is read at
    import. Also proves that torch stays out, and that neither output holds the token."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from megatron_syne.convert.hub import resolve_hub_id\n"
        "from megatron_syne.errors import MissingInput\n"
        f"try: print(resolve_hub_id({name!r}, {revision!r}))\n"
        "except MissingInput as error: print(f'MissingInput: {error}')\n"
    )
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "NO_PROXY": "*",
    }
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | settings | env
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("revision", [None, "v1", COMMIT])
def test_download(tmp_path: Path, hub: str, revision: str | None) -> None:
    folder = Path(resolve(tmp_path, hub, "org/good", revision))
    assert {path.name for path in folder.iterdir()} == FETCHED
    assert all((folder / name).read_bytes() == FILES[name] for name in FETCHED)
    assert hub_origin(folder) == {"id": "org/good", "revision": COMMIT}
    fetched = [line for line in Hub.asked if line.startswith("GET") and "resolve" in line]
    assert len(fetched) == len(FETCHED), "nothing but the wanted files crossed the network"


def test_downloaded_once_then_without_network(tmp_path: Path, hub: str) -> None:
    first = resolve(tmp_path, hub, "org/good")
    Hub.asked.clear()
    assert resolve(tmp_path, hub, "org/good") == first
    assert not [line for line in Hub.asked if "resolve" in line], "the cache was not used"
    assert resolve(tmp_path, hub, "org/good", HF_HUB_OFFLINE="1") == first
    assert resolve(tmp_path, "http://127.0.0.1:9", "org/good") == first


@pytest.mark.parametrize(
    ("name", "revision", "words"),
    [
        ("org/gated", None, ["gated", "accept its licence at", "hf auth login"]),
        ("org/absent", None, ["no such folder", "no such model on the hub"]),
        ("org/good", "v9", ["revision v9", "no such branch, tag or commit"]),
        ("org/pickles", None, ["has no safetensors"]),
        ("org/broken", None, ["cannot be reached", "500"]),
        ("good", None, ["no such folder, and no hub id either"]),
        ("org/../good", None, ["no such folder, and no hub id either"]),
        ("/org/good", None, ["no such folder, and no hub id either"]),
    ],
)
def test_refusals(tmp_path: Path, hub: str, name: str, revision: str | None, words: list[str]) -> None:
    said = resolve(tmp_path, hub, name, revision)
    assert said.startswith("MissingInput: ") and "\n" not in said
    assert all(word in said for word in words), said


@pytest.mark.parametrize("env", [{"HF_HUB_OFFLINE": "1"}, {}])
def test_no_network_and_not_in_the_cache(tmp_path: Path, env: dict[str, str]) -> None:
    said = resolve(tmp_path, "http://127.0.0.1:9", "org/good", **env)
    assert said.startswith("MissingInput: org/good: not in the hub's cache"), said
    assert "hf download org/good" in said


def test_a_local_folder_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "good").mkdir(parents=True)
    assert resolve_hub_id("org/good") == Path("org/good")
    assert hub_origin(tmp_path / "org" / "good") is None


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingInput, match="pip install huggingface_hub"):
        resolve_hub_id("org/good")
