"""The doctor's findings: right on this machine, and right about what is broken on another."""

from importlib import metadata

import pytest

from persona_sdk import doctor
from persona_sdk.memory import MemoryStore


def by_name(store=None) -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.checks(store)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PERSONA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_ready_machine_is_found_ready(cache, monkeypatch):
    monkeypatch.setattr(doctor, "CONVERSION_BYTES", 0)  # how full this disk is proves nothing
    found = by_name()
    assert {name: check.detail for name, check in found.items() if not check.ok} == {}
    assert set(doctor.NAMED) | {"python", "device", "cache", "disk", "minilm", "smollm2-135m"} <= set(found)
    assert found["torch"].detail == metadata.version("torch")
    assert not cache.exists()


@pytest.mark.parametrize("name", ["faiss-cpu", "typer"])
def test_a_wrong_or_missing_package_has_its_own_line(monkeypatch, name):
    real = metadata.version
    monkeypatch.setattr(doctor.metadata, "version", lambda asked: "0.0.1" if asked == name else real(asked))
    check = by_name()[name]
    assert not check.ok
    assert check.detail.startswith("0.0.1, needs >=")
    assert f'pip install "{name}>=' in check.hint

    def missing(asked):
        if asked == name:
            raise metadata.PackageNotFoundError(asked)
        return real(asked)

    monkeypatch.setattr(doctor.metadata, "version", missing)
    assert by_name()[name].detail == "not installed"


def test_a_package_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGE", "persona-sdk-that-is-not-there")
    found = by_name()
    assert not found["packages"].ok
    assert found["python"].ok


def test_a_cache_in_the_way_of_a_file_is_found(cache):
    cache.write_text("a file")
    found = by_name()
    assert not found["cache"].ok
    assert "PERSONA_CACHE" in found["cache"].hint


def test_too_little_disk_is_found(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10**9})())
    check = by_name()["disk"]
    assert (check.ok, check.detail) == (False, "1.0 GB free")


def test_a_store_is_opened_and_a_missing_or_broken_one_is_said(tmp_path):
    MemoryStore.open(tmp_path / "store").close()
    assert by_name(tmp_path / "store")["store"].detail.endswith("0 personas")
    missing = by_name(tmp_path / "nowhere")["store"]
    assert not missing.ok
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "broken").mkdir()
    for file in (tmp_path / "store").iterdir():
        (tmp_path / "broken" / file.name).write_bytes(b"not a database") if file.is_file() else None
    broken = by_name(tmp_path / "broken")["store"]
    assert not broken.ok
    assert broken.hint
