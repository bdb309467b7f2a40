"""Commands about memory: what a persona remembers, its audit log, snapshots, what the scheduler does."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

from persona_sdk.cli_common import Model, PersonaId, Store, console, open_store, require

memory = typer.Typer(no_args_is_help=True, help="What a persona remembers.")
audit = typer.Typer(no_args_is_help=True, help="Who wrote what and when; texts are never in it.")


@memory.command("list")
def list_memories(
    persona_id: PersonaId,
    store: Store = Path("personas"),
    turns: Annotated[bool, typer.Option(help="Also recorded conversations.")] = False,
    history: Annotated[bool, typer.Option(help="Also what was retired or is no longer so.")] = False,
) -> None:
    """Texts of a persona with their state, trust and validity."""
    from persona_sdk.memory.turns import TURN

    table = Table(Column("cube", no_wrap=True), "type", "state", "trust", "since", "until", "text")
    with open_store(store) as opened:
        require(opened, persona_id)
        cubes = opened.all_cubes(persona_id) if history else opened.cubes(persona_id, kind="plaintext")
        for cube in cubes:
            header = cube.header
            shown = turns or header.semantic_type != TURN
            if cube.text is not None and shown and (history or header.valid(datetime.now(UTC))):
                table.add_row(
                    cube.id,
                    header.semantic_type,
                    cube.state,
                    header.trust,
                    _day(header.valid_from),
                    _day(header.valid_to),
                    Text(cube.text, overflow="fold"),
                )
    console.print(table)


@memory.command()
def search(
    persona_id: PersonaId,
    query: str,
    k: Annotated[int, typer.Option("-k", min=1, help="How many.")] = 5,
    store: Store = Path("personas"),
) -> None:
    """The best memories for a query, with the parts of their scores."""
    from persona_sdk.memory import BoundStore, Principal, RetrievalOptions
    from persona_sdk.memory_system import MemorySystem

    table = Table("score", "cosine", "words", "near", "owner", "text")
    with open_store(store) as opened:
        kind = require(opened, persona_id)
        retriever = MemorySystem(opened, "minilm", RetrievalOptions()).retriever
        for passage in BoundStore(opened, Principal(persona_id, kind)).recall(retriever, query, k):
            why = passage.why
            parts = [f"{part:.2f}" for part in (why.dense, why.lexical, why.neighbours)] if why else ["-"] * 3
            table.add_row(
                f"{passage.score:.2f}", *parts, Text(passage.owner), Text(passage.text, overflow="fold")
            )
    console.print(table)


@memory.command()
def snapshot(persona_id: PersonaId, name: str, store: Store = Path("personas")) -> None:
    """Name the newest revision, to roll back to."""
    with open_store(store) as opened:
        require(opened, persona_id)
        made = opened.snapshot(persona_id, name)
    console.print(f"{made.name} is revision {made.revision}", markup=False)


@memory.command()
def expire(store: Store = Path("personas")) -> None:
    """Erase everything whose time has passed, of all personas."""
    from persona_sdk.memory.expiry import expire as sweep

    with open_store(store) as opened:
        receipts = sweep(opened, now=datetime.now(UTC))
    console.print(f"erased {sum(len(receipt.cube_ids) for receipt in receipts)} cubes")


@memory.command()
def promote(
    persona_id: PersonaId,
    store: Store = Path("personas"),
    model: Model = "smollm2-135m",
    dry_run: Annotated[bool, typer.Option(help="Say what would be done, and why; change nothing.")] = False,
) -> None:
    """Move memories between text, kept keys and values, and weights, as their use pays.

    It also erases what has expired, for good, and archives texts that were not used for long, which
    `persona.memory.activate` brings back. See first with --dry-run.
    """
    from persona_sdk import PersonaModel
    from persona_sdk.memory.scheduler import explain

    with console.status("loading the model"):
        loaded = PersonaModel.from_pretrained(model, store=store)
    with loaded:
        require(loaded.store, persona_id)
        promoter = loaded.promoter()
        if dry_run:
            for line in explain(promoter.plan(persona_id)):
                console.print(line, markup=False, highlight=False, soft_wrap=True)
            return
        for outcome in promoter.run(persona_id):
            line = f"{outcome.status:<9} {outcome.decision.kind:<16} {outcome.decision.reason} {outcome.note}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)


@audit.command()
def show(persona_id: PersonaId, store: Store = Path("personas")) -> None:
    """Every write to a persona."""
    table = Table("number", "when", "who", "what", "details")
    with open_store(store) as opened:
        require(opened, persona_id)
        for event in opened.audit(persona_id):
            when = f"{event.at:%Y-%m-%d %H:%M:%S}"
            table.add_row(str(event.number), when, Text(event.actor), event.kind, Text(str(event.details)))
    console.print(table)


@audit.command()
def verify(
    persona_id: Annotated[str | None, typer.Argument(help="One persona; all if left out.")] = None,
    store: Store = Path("personas"),
) -> None:
    """Check the chains of hashes; exits with 1 when something was changed, removed or added."""
    from persona_sdk.memory.events import STORE

    broken = 0
    with open_store(store) as opened:
        if persona_id is not None:
            require(opened, persona_id)
        owners = [persona_id] if persona_id else [STORE, *(record.id for record in opened.personas())]
        for owner in owners:
            faults = opened.verify_audit(owner)
            broken += bool(faults)
            events = len(opened.audit(owner))
            name = "the store" if owner == STORE else owner
            console.print(
                f"{'no' if faults else 'ok'}  {name}  {events} events", markup=False, highlight=False
            )
            for fault in faults:
                console.print(f"    {fault}", markup=False, highlight=False)
    if broken:
        raise typer.Exit(1)


@audit.command()
def head(persona_id: PersonaId, store: Store = Path("personas")) -> None:
    """Number and hash of the newest event, to be kept elsewhere: it proves what nobody can cut off later."""
    from persona_sdk.memory import events

    with open_store(store) as opened:
        require(opened, persona_id)
        with opened.reading() as connection:
            found = events.head(connection, persona_id)
    console.print(f"{found.number} {found.hash}", markup=False, highlight=False, soft_wrap=True)


def _day(moment: datetime | None) -> str:
    return "" if moment is None else f"{moment:%Y-%m-%d}"
