"""The ``persona`` command: chat, personas, models, doctor; `cli_memory`, `cli_train`, `cli_pareto`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from persona_sdk.cli_common import Model, PersonaId, Store, Yes, console, errors, open_store, require
from persona_sdk.cli_memory import audit, memory
from persona_sdk.cli_pareto import pareto
from persona_sdk.cli_train import train
from persona_sdk.errors import InvalidInputError, PersonaError

if TYPE_CHECKING:
    from persona_sdk.memory import MemoryStore

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="One language model, a different one for every user."
)
personas = typer.Typer(no_args_is_help=True, help="Look after the personas of a store.")
models = typer.Typer(no_args_is_help=True, help="Base models and embedders.")
app.add_typer(personas, name="personas")
app.add_typer(models, name="models")
app.add_typer(memory, name="memory")
app.add_typer(audit, name="audit")
app.add_typer(train, name="train")
app.command()(pareto)


def main() -> None:
    """Run the command line; expected errors print one line and a hint, and exit with 1."""
    try:
        app()
    except PersonaError as error:
        errors.print(f"[bold red]{error.code}[/]  {escape(error.message)}")
        if error.hint:
            errors.print(f"[dim]{escape(error.hint)}[/]")
        raise SystemExit(1) from None


@app.command()
def chat(
    user: Annotated[str, typer.Option("--user", "-u", help="Who is talking.")],
    message: Annotated[str | None, typer.Argument(help="Say one thing and leave.")] = None,
    groups: Annotated[list[str] | None, typer.Option("--group", "-g", help="Set the user's groups.")] = None,
    store: Store = Path("personas"),
    model: Model = "smollm2-135m",
    max_new_tokens: int = 128,
    do_sample: bool = False,
    seed: int = 0,
    learn: Annotated[bool, typer.Option(help="Remember what is said.")] = False,
) -> None:
    """Talk as a user. /help lists the commands that work inside; --learn remembers what is said."""
    from persona_sdk import PersonaModel
    from persona_sdk.reply import Reply

    with console.status("loading the model"):
        loaded = PersonaModel.from_pretrained(model, store=store)
    with loaded:
        persona = loaded.persona(user, groups=groups)
        turns: list[dict[str, str]] = []
        last: Reply | None = None

        def say(text: str) -> Reply:
            asked = [*turns, {"role": "user", "content": text}]
            stream = persona.stream(
                asked,
                seed=seed,
                max_new_tokens=max_new_tokens,
                do_sample=do_sample,
                overflow="drop_oldest_turns",
            )
            for piece in stream:
                console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
            console.print()
            reply = stream.reply
            if learn:
                persona.memory.learn_from(asked, reply)
            turns[:] = [*asked, {"role": "assistant", "content": reply.text.strip() or "..."}]
            if reply.dropped_turns:
                console.print(f"[dim]({reply.dropped_turns} oldest turns no longer fit and were left out)[/]")
            return reply

        if message is not None:
            say(message)
            return
        console.print(f"[dim]{user}, revision {persona.revision}. /help lists the commands.[/]")
        while True:
            try:
                line = console.input("[bold green]you[/] ").strip()
            except (EOFError, KeyboardInterrupt):
                return
            command, _, argument = line.partition(" ")
            try:
                match command:
                    case "":
                        continue
                    case "/quit" | "/exit":
                        return
                    case "/help":
                        console.print(
                            "/remember TEXT   /forget PHRASE   /explain   /history   /quit", markup=False
                        )
                    case "/remember":
                        cube = persona.remember(argument)
                        console.print(f"[dim]remembered as {cube.id}, revision {cube.revision}[/]")
                    case "/forget":
                        receipt = persona.forget(argument)
                        console.print(f"[dim]forgot {len(receipt.cube_ids)} cubes[/]")
                    case "/explain":
                        console.print(persona.explain(last) if last else "[dim]Nothing was said yet.[/]")
                    case "/history":
                        _print_history(loaded.store, user)
                    case _:
                        last = say(line)
            except PersonaError as error:
                errors.print(f"[red]{escape(str(error))}[/]")


@personas.command("list")
def list_personas(store: Store = Path("personas")) -> None:
    """All personas of a store."""
    table = Table("id", "kind", "revision", "cubes", "since")
    with open_store(store) as opened:
        for record in opened.personas():
            since = f"{record.created_at:%Y-%m-%d %H:%M}"
            table.add_row(Text(record.id), record.kind, str(record.revision), str(record.cubes), since)
    console.print(table)


@personas.command()
def show(persona_id: PersonaId, store: Store = Path("personas")) -> None:
    """What a persona consists of right now."""
    table = Table(Column("cube", no_wrap=True), "kind", "type", "revision", "content")
    with open_store(store) as opened:
        require(opened, persona_id)
        groups = opened.groups(persona_id)
        for cube in opened.cubes(persona_id):
            content = cube.text if cube.text is not None else cube.header.title
            table.add_row(
                cube.id,
                cube.kind,
                cube.header.semantic_type,
                str(cube.revision),
                Text(content, overflow="fold"),
            )
        console.print(
            f"{escape(persona_id)}  revision {opened.head(persona_id)}  groups {', '.join(groups) or '-'}"
        )
    console.print(table)


@personas.command()
def history(persona_id: PersonaId, store: Store = Path("personas")) -> None:
    """Every revision of a persona."""
    with open_store(store) as opened:
        require(opened, persona_id)
        _print_history(opened, persona_id)


@personas.command()
def rollback(persona_id: PersonaId, revision: str, store: Store = Path("personas")) -> None:
    """Make a new revision with the content of an old one, or of a snapshot."""
    with open_store(store) as opened:
        made = opened.rollback(persona_id, int(revision) if revision.isdecimal() else revision)
    console.print(
        f"{escape(persona_id)} is at revision {made.number}, with the content of {escape(revision)}"
    )


@personas.command()
def forget(
    persona_id: PersonaId,
    cube: Annotated[str | None, typer.Argument(help="One cube id; everything if left out.")] = None,
    store: Store = Path("personas"),
    yes: Yes = False,
) -> None:
    """Erase a cube and all that derives from it, or a whole persona. There is no way back."""
    with open_store(store) as opened:
        require(opened, persona_id)
        if cube == "":  # an empty shell variable must not erase a persona
            raise InvalidInputError("The cube id is empty.", hint="Leave it out to erase the whole persona.")
        what = f"everything about {persona_id}" if cube is None else f"cube {cube}"
        if not yes:
            typer.confirm(f"Erase {what}?", abort=True)
        receipt = opened.forget_everything(persona_id) if cube is None else opened.forget(persona_id, [cube])
    console.print_json(receipt.canonical())


@personas.command()
def export(persona_id: PersonaId, path: Path, store: Store = Path("personas")) -> None:
    """Write a persona, history included, to one archive file."""
    with open_store(store) as opened:
        written = opened.export(persona_id, path)
    console.print(f"{written}  {written.stat().st_size:,} bytes", highlight=False)


@personas.command("import")
def import_persona(
    path: Path,
    as_id: Annotated[str | None, typer.Option("--as", help="Id to give the persona.")] = None,
    store: Store = Path("personas"),
) -> None:
    """Read an archive made by export."""
    with open_store(store, create=True) as opened:
        owner = opened.import_archive(path, as_id=as_id)
        console.print(f"{escape(owner)} imported, revision {opened.head(owner)}")


@models.command("list")
def list_models() -> None:
    """Models that have a short name."""
    from persona_sdk import weights

    table = Table("alias", "kind", "source", "licence", "cached")
    for row in weights.known():
        table.add_row(
            row.alias, row.kind, row.source, row.licence, f"{row.bytes / 1e6:.0f} MB" if row.cached else "-"
        )
    console.print(table)


@models.command()
def pull(
    names: Annotated[
        list[str] | None, typer.Argument(help="Aliases or hub ids; all aliases if left out.")
    ] = None,
) -> None:
    """Fetch weights into the cache, so that later loads need no network."""
    from persona_sdk import weights

    for name in names or [row.alias for row in weights.known()]:
        folder = weights.pull(name, progress=True)
        console.print(f"{name:<14} {folder}", highlight=False, soft_wrap=True)


@app.command()
def doctor(store: Annotated[Path | None, typer.Option(help="Also check this store.")] = None) -> None:
    """Check versions, device, cache and store; exits with 1 when something is wrong."""
    from persona_sdk.doctor import checks

    table = Table("", "check", "found", "what to do")
    found = checks(store)
    for check in found:
        mark = Text("ok", style="green") if check.ok else Text("no", style="bold red")
        table.add_row(
            mark, check.name, Text(check.detail, overflow="fold"), "" if check.ok else Text(check.hint)
        )
    console.print(table)
    if not all(check.ok for check in found):
        raise typer.Exit(1)


def _print_history(store: "MemoryStore", persona_id: str) -> None:
    table = Table("revision", "when", "what", "+", "-")
    for revision in store.history(persona_id):
        what = revision.message
        if revision.restores is not None:
            what = f"{what} (back to {revision.restores})"
        when = f"{revision.created_at:%Y-%m-%d %H:%M:%S}"
        table.add_row(
            str(revision.number), when, Text(what), str(len(revision.added)), str(len(revision.retired))
        )
    console.print(table)


if __name__ == "__main__":
    main()
