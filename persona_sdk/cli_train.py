"""``persona train``: one command for each family that can be trained from a file."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_sdk.cli_common import Model, console
from persona_sdk.errors import InvalidInputError

if TYPE_CHECKING:
    from persona_sdk.adapters.checkpoints import Checkpoints

_SAVE_STEPS = 50

train = typer.Typer(no_args_is_help=True, help="Train an adapter and write it to a folder.")


@train.callback()
def _families() -> None:
    """One command would otherwise take the place of its group."""


@train.command()
def panacea(
    data: Annotated[Path, typer.Option(help="Rows of every dimension: JSON Lines, also .gz.")],
    out: Annotated[Path, typer.Option(help="A new folder.")],
    model: Model = "smollm2-135m",
    held_out: Annotated[
        Path | None, typer.Option(help="Rows to stop early on: the weights of the best evaluation are kept.")
    ] = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(help="Folder to keep checkpoints of this run in; the same command again goes on."),
    ] = None,
    save_steps: Annotated[
        int | None, typer.Option(min=1, help=f"Steps between two checkpoints; {_SAVE_STEPS} if not given.")
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", help="name=value, e.g. objective=dpo, rank=16, max_steps=500."),
    ] = None,
) -> None:
    """Train one adapter for all preferences over the dimensions that the file names.

    Rows are those of `persona pareto`. Options and defaults are those of PanaceaConfig; values are JSON, or
    else text. With held-out rows the hypervolume of a small grid of preferences is measured every eval_steps
    steps, and training ends after early_stopping_patience measurements without a gain.
    """
    from persona_sdk import preference_files
    from persona_sdk.adapters.panacea import Panacea
    from persona_sdk.models import LanguageModel

    _require_new(out)
    kept = _checkpoints(checkpoints, save_steps, out)
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
    measured = None if held_out is None else preference_files.read(held_out, config.dimensions, objective)
    with console.status("loading the model"):
        base = LanguageModel.from_pretrained(model)
    kept_out = None if measured is None else measured.data
    adapter = Panacea.train(base, file.data, config, held_out=kept_out, checkpoints=kept)
    adapter.save_pretrained(out)
    report, dimensions = adapter.report, ", ".join(config.dimensions)
    assert report is not None  # it was just trained
    best = "" if report.best_step is None else f", best after {report.best_step}"
    console.print(
        f"{out}  {dimensions}  {report.steps} steps{best}, {report.tokens:,} tokens, {report.seconds:.0f} s",
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


def _checkpoints(folder: Path | None, save_steps: int | None, out: Path) -> "Checkpoints | None":
    """Where and how often to save; nothing of it may lie where the adapter goes."""
    from persona_sdk.adapters.checkpoints import Checkpoints

    if folder is None:
        if save_steps is not None:
            raise InvalidInputError(
                f"--save-steps {save_steps} has no folder.", hint="Name one with --checkpoints."
            )
        return None
    if folder.resolve().is_relative_to(out.resolve()):
        raise InvalidInputError(
            f"The checkpoints {folder} would lie in the adapter {out}.", hint="Name a folder of their own."
        )
    if not _can_be_written(folder):
        raise InvalidInputError(f"{folder} cannot be written.", hint="Name a folder that can.")
    return Checkpoints(folder=folder, every=save_steps or _SAVE_STEPS)


def _require_new(out: Path) -> None:
    """Known before the training and not after it."""
    if out.exists() or not _can_be_written(out):
        raise InvalidInputError(
            f"{out} {'exists already' if out.exists() else 'cannot be written'}.", hint="Name a new folder."
        )


def _can_be_written(folder: Path) -> bool:
    """It, or the nearest that exists above it, is a folder of ours."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK)
