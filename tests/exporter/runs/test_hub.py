"""Models are found locally, bundled, in the hub's cache, or refused with what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from compressors.model.errors import InputError
from compressors.model.sources.opening import open_source
from exporter.hub import bundled_text, resolve_model

_REFUSALS = {"missing": (404, "RepoNotFound"), "gated": (403, "GatedRepo"), "old": (404, "RevisionNotFound")}
_COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Hub(BaseHTTPRequestHandler):
    """Refuses every request the way the hub does: by status code and an error code in a header."""

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/owner/").split("/")[0]
        status, code = _REFUSALS[name]
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Silent: the test's output is pytest's."""


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def _resolve_elsewhere(cache: Path, endpoint: str, call: str) -> str:
    """Returns ``resolve_model``'s result or message in a new process: huggingface_hub reads settings at import."""
    script = (
        "from compressors.model.errors import InputError\n"
        "from exporter.hub import resolve_model\n"
        f"try: print(resolve_model({call}))\n"
        "except InputError as error: print('InputError', error)\n"
    )
    hidden = ("HF_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HUGGINGFACE")
    environment = {key: value for key, value in os.environ.items() if not key.upper().startswith(hidden)}
    environment |= {"HF_HOME": str(cache), "HF_ENDPOINT": endpoint}
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_no_model_means_the_bundled_one() -> None:
    assert open_source(resolve_model(None)).spec.n_experts == 32


@pytest.mark.parametrize("split", ["calibration", "heldout"])
def test_the_bundled_text_has_five_domains(split: str) -> None:
    domains = [file.stem for file in sorted(bundled_text(split).glob("*.txt"))]
    assert domains == ["code", "encyclopedic", "prose", "religion", "technical"]


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("model", ["./no-such-folder", "/no/such/folder", "a/b/c", "", "owner/na me"])
def test_what_is_neither_folder_nor_hub_id_is_refused(model: str) -> None:
    with pytest.raises(InputError, match=r"^MODEL: "):
        resolve_model(model, offline=True)


def test_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(InputError, match=r"^MODEL: .* is a file; give the folder that holds config\.json"):
        resolve_model(str(file))


def test_a_gguf_file_is_left_to_what_opens_it(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    assert resolve_model(str(file)) == file
    with pytest.raises(InputError, match="truncated or not a GGUF file"):
        open_source(file)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("'owner/missing'", "MODEL: owner/missing is neither a local folder nor a model on the hub"),
        ("'owner/gated'", "MODEL: owner/gated is gated; accept its licence"),
        ("'owner/old', 'v9'", "--revision: owner/old has no revision 'v9'"),
    ],
)
def test_refusals_of_the_hub_say_what_to_do(hub: str, tmp_path: Path, call: str, message: str) -> None:
    assert _resolve_elsewhere(tmp_path, hub, call).startswith(f"InputError {message}")


def test_a_hub_out_of_reach_is_said_so(tmp_path: Path) -> None:
    answer = _resolve_elsewhere(tmp_path, "http://127.0.0.1:9", "'owner/name'")
    assert answer.startswith("InputError MODEL: owner/name is no local folder, and the hub cannot be reached")


def test_offline_takes_what_the_cache_has(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / _COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(_COMMIT)
    nowhere = "http://127.0.0.1:9"
    assert _resolve_elsewhere(tmp_path, nowhere, "'owner/name', offline=True") == str(snapshot)
    answer = _resolve_elsewhere(tmp_path, nowhere, "'owner/other', offline=True")
    assert answer == "InputError MODEL: owner/other is not in the hub's cache; run once without --offline"
