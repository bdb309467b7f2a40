"""What the commands share: arguments, consoles, and opening a store."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from persona_sdk.errors import NotFoundError

if TYPE_CHECKING:
    from persona_sdk.memory import MemoryStore
    from persona_sdk.memory.cube import PersonaKind

console = Console()
errors = Console(stderr=True)

Store = Annotated[Path, typer.Option("--store", envvar="PERSONA_STORE", help="Folder of the store.")]
Model = Annotated[str, typer.Option("--model", envvar="PERSONA_MODEL", help="Alias, path or hub id.")]
PersonaId = Annotated[str, typer.Argument(help="Id of a user or a group.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@contextmanager
def open_store(store: Path, *, create: bool = False) -> Iterator["MemoryStore"]:
    """The store in a folder, which is made only if `create`."""
    from persona_sdk.memory import MemoryStore

    if not create and not (store / "personas.db").exists():
        raise NotFoundError(f"There is no store in {str(store)!r}.", hint="Name its folder with --store.")
    with MemoryStore.open(store) as opened:
        yield opened


def require(store: "MemoryStore", persona_id: str) -> "PersonaKind":
    """The kind of a persona that is there; `NotFoundError` if it is not."""
    kind = store.kind_of(persona_id)
    if kind is None:
        raise NotFoundError(
            f"There is no persona {persona_id!r} here.", hint="persona personas list shows them."
        )
    return kind
