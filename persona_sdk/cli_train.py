"""``persona train``: one command for each family that can be trained from a file."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from persona_sdk.cli_common import Model, console
from persona_sdk.errors import InvalidInputError

train = typer.Typer(no_args_is_help=True, help="Train an adapter and write it to a folder.")


@train.callback()
def _families() -> None:
    """One command would otherwise take the place of its group."""


@train.command()
def panacea(
    data: Annotated[Path, typer.Option(help="Rows of every dimension: JSON Lines, also .gz.")],
    out: Annotated[Path, typer.Option(help="A new folder.")],
    model: Model = "smollm2-135m",
    options: Annotated[
        list[str] | None,
        typer.Option("--set", help="name=value, e.g. objective=dpo, rank=16, max_steps=500."),
    ] = None,
) -> None:
    """Train one adapter for all preferences over the dimensions that the file names.

    Rows are those of `persona pareto`. Options and defaults are those of PanaceaConfig; values are JSON, or
    else text.
    """
    from persona_sdk import preference_files
    from persona_sdk.adapters.panacea import Panacea
    from persona_sdk.models import LanguageModel

    _require_new(out)
    given = _options(options or ())
    objective = given.get("objective", "sft")
    if objective not in ("sft", "dpo"):
        raise InvalidInputError(
            f"objective={objective} cannot be trained from a file.",
            hint="Expected sft or dpo; rewards are functions, see Panacea.train.",
        )
    chosen = Panacea.configure(given).dimensions if "dimensions" in given else None
    file = preference_files.read(data, chosen, objective)
    config = Panacea.configure({**given, "dimensions": tuple(file.data)})
    with console.status("loading the model"):
        base = LanguageModel.from_pretrained(model)
    adapter = Panacea.train(base, file.data, config)
    adapter.save_pretrained(out)
    report, dimensions = adapter.report, ", ".join(config.dimensions)
    assert report is not None  # it was just trained
    console.print(
        f"{out}  {dimensions}  {report.steps} steps, {report.tokens:,} tokens, {report.seconds:.0f} s",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _options(given: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for option in given:
        name, equals, text = option.partition("=")
        if not equals or name in found:
            raise InvalidInputError(
                f"--set {option!r} cannot be used.", hint="Expected name=value, each name once."
            )
        try:
            found[name] = json.loads(text)
        except (ValueError, RecursionError):
            found[name] = text
    return found


def _require_new(out: Path) -> None:
    """Known before the training and not after it."""
    above = next(parent for parent in out.absolute().parents if parent.exists())
    if out.exists() or not (above.is_dir() and os.access(above, os.W_OK)):
        raise InvalidInputError(
            f"{out} {'exists already' if out.exists() else 'cannot be written'}.", hint="Name a new folder."
        )
