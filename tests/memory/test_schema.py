"""Opening: new, older, newer and foreign databases, and folders that cannot be used."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, inspect

from persona_sdk.errors import SchemaError, StoreError
from persona_sdk.memory import CubeDraft, MemoryStore, database
from persona_sdk.memory.schema import metadata

HEAD = ScriptDirectory(str(database.MIGRATIONS)).get_current_head()
SECOND = """
from alembic import op
import sqlalchemy as sa

revision = "9999"
down_revision = "{head}"

def upgrade() -> None:
    op.add_column("cubes", sa.Column("mood", sa.String(), server_default="calm"))
    {then}
"""


def newer_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str = "pass") -> None:
    """Make the package believe in one more migration."""
    folder = tmp_path / "migrations"
    shutil.copytree(database.MIGRATIONS, folder)
    (folder / "versions" / "9999_mood.py").write_text(SECOND.format(then=then, head=HEAD))
    monkeypatch.setattr(database, "MIGRATIONS", folder)


def columns(file: Path) -> set[str]:
    with closing(sqlite3.connect(file)) as raw:
        return {row[1] for row in raw.execute("PRAGMA table_info(cubes)")}


def test_migrations_and_tables_agree(store: MemoryStore) -> None:
    with store.reading() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_a_store_from_before_the_indexes_gets_them(folder: Path) -> None:
    folder.mkdir()
    engine = create_engine(f"sqlite:///{folder / 'personas.db'}")
    config = Config()
    config.set_main_option("script_location", str(database.MIGRATIONS))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0003")
        assert "cubes_by_slot" not in {index["name"] for index in inspect(connection).get_indexes("cubes")}
    engine.dispose()
    with MemoryStore.open(folder) as store, store.reading() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_every_table_has_an_owner() -> None:
    assert all("owner" in table.c for table in metadata.tables.values())


def test_the_pragmas_hold(store: MemoryStore, folder: Path) -> None:
    with store.reading() as connection:
        values = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "foreign_keys", "secure_delete", "synchronous")
        }
    assert values == {"journal_mode": "wal", "foreign_keys": 1, "secure_delete": 1, "synchronous": 2}


def test_an_older_store_is_copied_then_migrated(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MemoryStore.open(folder) as store:
        (cube_id,) = store.commit("alice", add=[CubeDraft.of("old text")]).added
    newer_code(tmp_path, monkeypatch)
    with MemoryStore.open(folder) as store:
        assert store.get("alice", cube_id).text == "old text"
    assert "mood" in columns(folder / "personas.db")
    backup = folder / f"personas.db.before-{HEAD}.bak"
    assert "mood" not in columns(backup)
    with closing(sqlite3.connect(backup)) as raw:
        assert raw.execute("SELECT text FROM cubes").fetchall() == [("old text",)]


def test_a_migration_that_fails_changes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    MemoryStore.open(folder).close()
    newer_code(tmp_path, monkeypatch, then='op.execute("INSERT INTO nowhere VALUES (1)")')
    with pytest.raises(StoreError):
        MemoryStore.open(folder)
    assert "mood" not in columns(folder / "personas.db")
    monkeypatch.undo()
    MemoryStore.open(folder).close()


def test_a_newer_store_is_refused_and_unchanged(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer_code(tmp_path, monkeypatch)
    with MemoryStore.open(folder) as store:
        store.commit("alice")
    monkeypatch.undo()
    before = (folder / "personas.db").read_bytes()
    with pytest.raises(SchemaError, match="newer schema"):
        MemoryStore.open(folder)
    assert (folder / "personas.db").read_bytes() == before
    assert not (folder / "personas.db-wal").exists() or not (folder / "personas.db-wal").stat().st_size


@pytest.mark.parametrize("version", [None, ""])
def test_a_foreign_database_is_refused_and_unchanged(folder: Path, version: str | None) -> None:
    folder.mkdir()
    file = folder / "personas.db"
    with closing(sqlite3.connect(file)) as raw:
        raw.execute(
            "CREATE TABLE contacts (name TEXT)"
            if version is None
            else "CREATE TABLE alembic_version (version_num)"
        )
        raw.commit()
    before = file.read_bytes()
    with pytest.raises(SchemaError, match="not a memory store"):
        MemoryStore.open(folder)
    assert file.read_bytes() == before


def test_what_is_no_folder_and_no_database_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("text")
    with pytest.raises(StoreError):
        MemoryStore.open(file)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "personas.db").write_bytes(b"not a database " * 100)
    with pytest.raises(StoreError, match="damaged or no database"):
        MemoryStore.open(tmp_path / "store")


def test_an_empty_database_file_is_a_new_store(folder: Path) -> None:
    folder.mkdir()
    (folder / "personas.db").touch()  # a crash right after the file was made
    with MemoryStore.open(folder) as store:
        assert store.commit("alice").number == 1
