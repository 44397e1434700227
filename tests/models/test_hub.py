"""Models of the hub: refusals by a local stand-in that answers as the hub does, the cache for real, no network."""

from __future__ import annotations

import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tc_deploy.errors import ModelError
from tc_deploy.models.hub import local_folder, wanted

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LOAD = """
import sys
from pathlib import Path
from tc_deploy.errors import ModelError
from tc_deploy.models.loading import load_model, load_scheduler
try:
    model = load_model(Path("someone/tiny-dit"))
    print(model.source, model.weights_sha256, type(load_scheduler(Path("someone/tiny-dit"))).__name__)
except ModelError as error:
    print("refused:", error)
"""


class _Hub(http.server.BaseHTTPRequestHandler):
    """Answers every request with the status and error code that the repository's name asks for."""

    def _answer(self) -> None:
        kind = next((kind for kind in ("gated", "unknown", "broken") if kind in self.path), "unknown")
        status, code = {"gated": (403, "GatedRepo"), "unknown": (404, "RepoNotFound"), "broken": (400, "")}[kind]
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = _answer  # noqa: N815 - the standard library's names

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gated", "it is gated: accept its licence on the hub's page and log in with: hf auth login"),
        ("unknown", "it is unknown or private; check the name"),
        ("broken", "it cannot be fetched, and is not in the cache: "),
    ],
)
def test_what_the_hub_refuses_is_one_line(hub: str, name: str, message: str) -> None:
    with pytest.raises(ModelError) as raised:
        local_folder(Path(f"someone/{name}-model"), endpoint=hub)
    assert str(raised.value).startswith(f"someone/{name}-model: no such folder, and as a model of the hub {message}")
    assert "\n" not in str(raised.value)


def load_offline(folder: Path, cache: Path) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    command = [sys.executable, "-c", LOAD]
    answer = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return answer.stdout.strip()


def test_offline_without_the_model_is_one_line(tmp_path: Path) -> None:
    said = load_offline(tmp_path, tmp_path / "cache")
    assert said.startswith("refused: someone/tiny-dit: no such folder, and as a model of the hub it cannot be fetched")
    assert said.endswith("or give a diffusers folder that is on this machine")
    assert "\n" not in said


def test_a_model_in_the_cache_is_loaded_offline(tiny_dit_folder: Path, tmp_path: Path) -> None:
    from tc_deploy.models.loading import load_model

    repository = tmp_path / "cache" / "models--someone--tiny-dit"
    shutil.copytree(tiny_dit_folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    expected = load_model(tiny_dit_folder).weights_sha256
    assert load_offline(tmp_path, tmp_path / "cache") == f"someone/tiny-dit {expected} DDIMScheduler"


@pytest.mark.parametrize("name", ["/absolute/name", "a/b/c", "name", "../owner/name", "./x", ""])
def test_other_paths_are_no_ids(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert local_folder(Path(name), endpoint="http://127.0.0.1:1") == Path(name)


def test_a_folder_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("someone/gated-model").mkdir(parents=True)
    assert local_folder(Path("someone/gated-model"), endpoint="http://127.0.0.1:1") == Path("someone/gated-model")


def test_neither_pickles_nor_other_parts_are_fetched() -> None:
    from fnmatch import fnmatch

    files = ["transformer/diffusion_pytorch_model.bin", "text_encoder/model.safetensors", "vae/config.json", "x.ckpt"]
    assert not [name for name in files if any(fnmatch(name, pattern) for pattern in wanted())]
    for name in ("transformer/diffusion_pytorch_model-00001-of-00003.safetensors", "scheduler/scheduler_config.json"):
        assert any(fnmatch(name, pattern) for pattern in wanted())
