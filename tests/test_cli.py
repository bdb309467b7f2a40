"""The command line, run as a user would: in a process of its own, or through typer's runner."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from persona_sdk import PersonaModel, cli
from persona_sdk.errors import InvalidInputError, NotFoundError
from persona_sdk.memory import MemoryStore
from persona_sdk.testing import HashEmbedder


@pytest.fixture
def store(tmp_path, tiny):
    folder = tmp_path / "store"
    with PersonaModel.from_pretrained(tiny, store=folder, embedder=HashEmbedder()) as model:
        alice = model.persona("alice", groups=["nurses"])
        alice.remember("Likes [bold]green[/bold] tea.")
        alice.remember("Has a dog.")
    return str(folder)


def run(*arguments: str, code: int = 0, text: str | None = None) -> str:
    result = CliRunner(env={"COLUMNS": "160"}).invoke(
        cli.app, list(arguments), input=text, catch_exceptions=False
    )
    assert result.exit_code == code, result.output
    return result.output


def test_list_show_history(store):
    assert "alice" in run("personas", "list", "--store", store)
    shown = run("personas", "show", "alice", "--store", store)
    assert "nurses" in shown
    assert "[bold]green[/bold]" in shown  # memory text is no markup
    assert run("personas", "history", "alice", "--store", store).count("remember") == 2


def test_rollback_export_forget_import(store, tmp_path):
    archive = str(tmp_path / "alice.memcube")
    assert "revision 4" in run("personas", "rollback", "alice", "2", "--store", store)
    assert "Has a dog." not in run("personas", "show", "alice", "--store", store)
    run("personas", "export", "alice", archive, "--store", store)
    run("personas", "forget", "alice", "--store", store, code=1, text="n\n")
    receipt = json.loads(run("personas", "forget", "alice", "--store", store, "--yes"))
    assert receipt["owner"] == "alice"
    assert "alice" not in run("personas", "list", "--store", store)
    run("personas", "import", archive, "--as", "alice2", "--store", store)
    assert "green" in run("personas", "show", "alice2", "--store", store)


def test_models_list():
    listed = run("models", "list")
    assert "smollm2-135m" in listed
    assert "Apache-2.0" in listed


def test_doctor_reports_the_store(store, tmp_path):
    assert "ok" in run("doctor", "--store", store)
    broken = tmp_path / "file"
    broken.write_text("not a store")
    assert "no" in run("doctor", "--store", str(broken), code=1)


def test_errors_are_one_line_and_a_hint_not_a_traceback(store):
    command = [sys.executable, "-m", "persona_sdk.cli", "personas", "history", "nobody", "--store", store]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "not_found" in done.stderr
    assert "nobody" in done.stderr
    assert "Traceback" not in done.stderr


def test_chat_says_one_thing_and_leaves(store, tmp_path, tiny):
    folder = tmp_path / "model"
    tiny.module.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    common = ("--model", str(folder), "--store", store, "--max-new-tokens", "5")
    said = run("chat", "Hello", "--user", "newcomer", *common)
    assert said.strip()
    session = run("chat", "--user", "newcomer", *common, text="Hello\n/explain\n/history\n/nothing\n/quit\n")
    assert "newcomer@0" in session
    assert "newcomer" not in run("personas", "list", "--store", store)  # talking is reading


def test_an_empty_cube_id_erases_nothing(store):
    with pytest.raises(InvalidInputError, match="empty"):
        run("personas", "forget", "alice", "", "--yes", "--store", store)
    assert "dog" in run("personas", "show", "alice", "--store", store)


def test_looking_makes_no_store(tmp_path):
    with pytest.raises(NotFoundError, match="no store"):
        run("personas", "list", "--store", str(tmp_path / "typo"))
    assert not (tmp_path / "typo").exists()


def test_a_cube_that_is_shown_can_be_forgotten(store):
    with MemoryStore.open(store) as opened:
        cube = opened.cubes("alice")[0]
    assert cube.id in run("personas", "show", "alice", "--store", store).replace("\n", "")
    receipt = json.loads(run("personas", "forget", "alice", cube.id, "--yes", "--store", store))
    assert receipt["cube_ids"] == [cube.id]
