"""The database of a store, as the rest of the package sees it: one seam, two backends.

    open        connect, refuse what is no store, migrate          `sqlite.SQLite`, `postgres.PostgreSQL`
    reading     a transaction that sees one state of the rows
    writing     a transaction that excludes other writers
    scrub       make erased bytes go away, as far as the backend can

The schema's version is alembic's. A fresh database is migrated to the newest version, an older one in one
transaction, and one this code does not know is refused before anything changes.
"""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine

from persona_sdk.errors import SchemaError
from persona_sdk.memory.database_errors import translated

__all__ = [
    "BACKUP_GLOB",
    "MIGRATIONS",
    "Database",
    "newest_version",
    "require_known",
    "translated",
    "upgrade",
]

MIGRATIONS = Path(__file__).parent / "migrations"
BACKUP_GLOB = "personas.db.before-*.bak"  # copies that SQLite's migration makes


class Database(ABC):
    """An open database. ``folder`` is where the files beside it lie: the blobs."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine = engine
        self.folder = folder

    @abstractmethod
    def reading(self) -> AbstractContextManager[Connection]:
        """A transaction that sees one state of the rows and cannot be made to wait by writers."""

    @abstractmethod
    def writing(self, owner: str | None = None) -> AbstractContextManager[Connection]:
        """A transaction that excludes other writers, rolled back when the block raises.

        Args:
            owner: the only owner whose rows are written, where that is so: a backend may then let writers
                of other owners go on. None excludes every writer.
        """

    @abstractmethod
    def scrub(self) -> bool:
        """Rewrite what erased rows occupied; whether all of it was possible. See the backends."""

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def require_known(version: str, name: str) -> None:
    """Check that this code can read a schema; "" is that of a database that is no store.

    Raises:
        SchemaError: it is newer, or no store's.
    """
    if version not in _versions(MIGRATIONS):
        what = f"a newer schema ({version!r})" if version else "tables that are not a memory store's"
        raise SchemaError(
            f"{name} has {what}; it was not changed.",
            hint="Upgrade persona-sdk to the version that wrote it." if version else "Choose another place.",
        )


def newest_version() -> str:
    """The version `upgrade` leads to."""
    return _versions(MIGRATIONS)[0]


def upgrade(connection: Connection) -> None:
    """Run the migrations that are missing, inside the caller's transaction."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


@cache
def _versions(folder: Path) -> tuple[str, ...]:
    """The versions that the migrations in a folder lead to, newest first."""
    return tuple(script.revision for script in ScriptDirectory(str(folder)).walk_revisions())
