"""The result's schema, atomic writes, resumable cells, and that nothing names this machine."""

import json
import os
import platform
import socket

import pytest
from pydantic import ValidationError

from benchmarks import harness
from benchmarks.harness import Bar, Cells, Result


def result(**changes: object) -> Result:
    fields: dict[str, object] = {
        "name": "compose",
        "command": "python -m benchmarks.compose",
        "commit": "0" * 40,
        "machine": harness.machine(),
        "versions": harness.versions("peft"),
        "bars": {"speed": Bar.of(2.5, ">=", 3.0, interval=(2.0, 3.5))},
        "tables": {"rows": [{"model": "tiny", "ratio": 1.5, "bytes": None}]},
        "notes": ["one"],
    }
    return Result(**{**fields, **changes})


def test_the_file_has_exactly_the_documented_keys(tmp_path):
    path = tmp_path / "new folder" / "compose.json"
    harness.write(result(), path)
    data = json.loads(path.read_text())
    assert set(data) == {"name", "command", "commit", "machine", "versions", "bars", "tables", "notes"}
    assert data["bars"]["speed"] == {
        "value": 2.5,
        "interval": [2.0, 3.5],
        "target": 3.0,
        "op": ">=",
        "ok": False,
    }
    assert harness.read(path) == result()


@pytest.mark.parametrize(
    ("value", "op", "ok"), [(3.0, ">=", True), (2.99, ">=", False), (3.0, "<=", True), (3.01, "<=", False)]
)
def test_a_bar_is_met_at_its_target(value, op, ok):
    assert Bar.of(value, op, 3.0).ok is ok


def test_a_bar_cannot_claim_what_its_numbers_deny(tmp_path):
    path = tmp_path / "compose.json"
    harness.write(result(), path)
    path.write_text(path.read_text().replace('"ok": false', '"ok": true'))
    with pytest.raises(ValidationError, match="ok is True"):
        harness.read(path)


def test_a_bar_without_a_number_is_refused():
    with pytest.raises(ValidationError):
        Bar.of(float("nan"), "<=", 1.0)


def test_unknown_keys_are_refused(tmp_path):
    path = tmp_path / "compose.json"
    path.write_text(json.dumps({**result().model_dump(), "extra": 1}))
    with pytest.raises(ValidationError, match="extra"):
        harness.read(path)


def test_nothing_names_the_host_or_its_folders(tmp_path, monkeypatch):
    for module, function in ((platform, "node"), (socket, "gethostname")):
        monkeypatch.setattr(module, function, lambda: "secret-host")
    text = result(
        command=harness.command_line("compose", ["--json", str(tmp_path / "x.json")])
    ).model_dump_json()
    for secret in ("secret-host", str(tmp_path), os.getcwd(), os.path.expanduser("~")):
        assert secret not in text


def test_command_lines_keep_options_and_lose_folders():
    argv = ["--quick", "--json", "/home/me/out/x.json", "--resume=runs/today", "--seeds", "3"]
    expected = "python -m benchmarks.compose --quick --json x.json --resume=today --seeds 3"
    assert harness.command_line("compose", argv) == expected
    assert result(command=expected).quick
    assert not result(command="python -m benchmarks.compose --json quick.json").quick


def test_an_interrupted_write_leaves_the_old_result(tmp_path, monkeypatch):
    path = tmp_path / "compose.json"
    harness.write(result(), path)

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="no space"):
            harness.write(result(notes=["two"]), path)
    assert harness.read(path).notes == ["one"]
    assert os.listdir(tmp_path) == ["compose.json"]


def test_finished_cells_are_not_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "commit", lambda: "abc")
    measured = []

    def measure() -> dict[str, object]:
        measured.append(1)
        return {"seconds": [1.0, 2.0]}

    first = Cells(tmp_path / "run").run("a", measure)
    again = Cells(tmp_path / "run")
    assert again.run("a", measure) == first == {"seconds": [1.0, 2.0]}
    assert len(measured) == 1
    assert again.commits == {"abc"}
    Cells(tmp_path / "run").run("b", measure)
    assert len(measured) == 2


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"commit": "x"}', '{"commit": "x", "cell": 3}'])
def test_a_damaged_cell_is_measured_again(tmp_path, damage):
    (tmp_path / "a.json").write_text(damage)
    assert Cells(tmp_path).run("a", lambda: {"fresh": 1}) == {"fresh": 1}
    assert Cells(tmp_path).finished("a") == {"fresh": 1}


def test_without_a_folder_every_cell_is_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = Cells(None)
    assert cells.run("a", lambda: {"n": 1}) == {"n": 1}
    assert cells.run("a", lambda: {"n": 2}) == {"n": 2}
    assert os.listdir(tmp_path) == []
