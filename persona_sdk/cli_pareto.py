"""``persona pareto``: the Pareto front of an adapter as tables, JSON and a picture."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from persona_sdk.cli_common import Model, Store, console, errors, open_store
from persona_sdk.errors import AdapterError, InvalidInputError, NotFoundError
from persona_sdk.files import replacing

if TYPE_CHECKING:
    from persona_sdk.adapters.panacea import Panacea
    from persona_sdk.models import LanguageModel
    from persona_sdk.pareto_report import FrontReport


def pareto(
    adapter: Annotated[str, typer.Argument(help="A folder, or owner/name of an adapter in the store.")],
    data: Annotated[Path, typer.Option(help="Held-out rows: JSON Lines, also .gz.")],
    store: Store = Path("personas"),
    model: Model = "smollm2-135m",
    divisions: Annotated[
        int | None,
        typer.Option(min=1, help="Weights are multiples of 1/N; by default 10, 5, 3, 2 for 2, 3, 4, more."),
    ] = None,
    points: Annotated[int | None, typer.Option(help="The finest grid of at most N points instead.")] = None,
    reference: Annotated[
        str | None, typer.Option(help='As "concise=-30,detailed=-60"; by default from the base model.')
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw the front to this PNG.")] = None,
    compare: Annotated[list[str] | None, typer.Option(help="Another adapter on the same data.")] = None,
) -> None:
    """Measure what an adapter reaches for every preference vector of a grid, and score that front.

    Objectives are means over the rows: the log-likelihood of a reply in nats for SFT, the DPO objective of a
    pair for DPO; higher is better. The reference point of the hypervolume does not depend on the adapter: it
    is base - max(|base|, 1) for SFT, with the objectives of the base model, and -3 nats for DPO.

    A row is {"dimension", "prompt", "completion"} for SFT; {"dimension", "prompt", "chosen", "rejected"} or
    {"prompt", "response_0", "response_1", "better": {dimension: 0 or 1}} for DPO.
    """
    import torch

    from persona_sdk import front_plots, pareto_report, preference_files
    from persona_sdk.adapters.fronts import Front
    from persona_sdk.models import LanguageModel

    _require_writable(json_file, plot_file)
    with console.status("loading the model"):
        base = LanguageModel.from_pretrained(model)
    adapters = {name: _load(name, store, base) for name in (adapter, *(compare or []))}
    pareto_report.require_comparable(adapters)
    config = adapters[adapter].config
    names, objective = config.dimensions, config.objective
    assert objective != "reward"  # `require_panacea`
    point = None if reference is None else _reference(reference, names)
    grid = pareto_report.preference_grid(len(names), divisions, points)
    file = preference_files.read(data, names, objective)
    if plot_file is not None:  # hours before it is needed: matplotlib may be missing
        front_plots.plot({adapter: Front(names, grid, torch.zeros_like(grid))}, point)
    with _bar(len(adapters) * len(grid)) as advance:
        reports = pareto_report.measure(base, adapters, file.data, grid, point, advance=advance)

    rule = pareto_report.RULES[objective] if point is None else "given"
    outputs: dict[Path, bytes] = {}
    if json_file is not None:
        content = pareto_report.as_dict(reports, base, file, objective=objective, rule=rule)
        outputs[json_file] = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False).encode()
    if plot_file is not None:
        short = {Path(name).name for name in adapters}
        fronts = {
            Path(report.name).name if len(short) == len(adapters) else report.name: report.front
            for report in reports
        }
        title = f"{objective} objectives of {file.rows} rows, {len(grid)} preference vectors"
        outputs[plot_file] = front_plots.png(front_plots.plot(fronts, reports[0].scores.reference, title))
    _write(outputs)
    for report in reports:
        _print_front(report)
    _print_scores(reports, rule)


def _load(name: str, store: Path, base: "LanguageModel") -> "Panacea":
    """The adapter in a folder, or else in the store."""
    from persona_sdk.adapters.panacea import Panacea
    from persona_sdk.library import AdapterLibrary
    from persona_sdk.pareto_report import require_panacea

    if (folder := Path(name).expanduser()).is_dir():
        return require_panacea(Panacea.from_pretrained(folder, base=base), name)
    try:
        with open_store(store) as opened:
            return require_panacea(AdapterLibrary(base, opened).get(name), name)
    except NotFoundError as error:
        raise NotFoundError(f"{name!r} is no folder. {error.message}", hint=error.hint) from error


def _reference(text: str, names: Sequence[str]) -> list[float]:
    """Numbers in the order of `names` from ``"concise=-30,detailed=-60"``."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = (piece.strip() for piece in part.partition("="))
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        if name not in names or name in found or not abs(value) < float("inf"):
            raise InvalidInputError(
                f"The reference holds {part!r}.", hint=f"Expected one number for each of {', '.join(names)}."
            )
        found[name] = value
    if absent := [name for name in names if name not in found]:
        raise InvalidInputError(
            f"The reference lacks {', '.join(absent)}.", hint='Expected "name=number,name=number".'
        )
    return [found[name] for name in names]


def _require_writable(*targets: Path | None) -> None:
    """Known before the measurement and not after it."""
    given = [target.absolute() for target in targets if target is not None]
    for target in given:
        fits = target.parent.is_dir() and os.access(target.parent, os.W_OK) and not target.is_dir()
        if not fits or given.count(target) > 1:
            raise InvalidInputError(
                f"{target} cannot be written.",
                hint="Name a file of its own for each, in a folder that exists and lets you write.",
            )


def _write(outputs: dict[Path, bytes]) -> None:
    """Every file is on the disk before the first takes its place."""
    try:
        with ExitStack() as written:
            for target, content in outputs.items():
                written.enter_context(replacing(target)).write_bytes(content)
    except OSError as error:
        raise AdapterError(
            f"The result could not be written: {error}.",
            hint="Check space and permissions, and run it again.",
        ) from error


@contextmanager
def _bar(total: int) -> Iterator[Callable[[], None]]:
    columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("measuring", total=total)
        yield lambda: progress.advance(task)


def _print_front(report: "FrontReport") -> None:
    """Every λ with what it reached, then what holds of each objective."""
    names, scores = report.front.names, report.scores
    table = Table("λ", *(Column(Text(name), justify="right") for name in names), title=Text(report.name))
    for weights, values in zip(report.front.preferences.tolist(), report.front.values.tolist(), strict=True):
        said = " ".join(f"{name} {w:.3g}" for name, w in zip(names, weights, strict=True) if w > 0)
        table.add_row(Text(said), *(f"{value:.4g}" for value in values))
    table.add_section()
    for what, row in {
        "base model": report.base,
        "reference": scores.reference,
        "range": scores.ranges,
        "Spearman of λ and objective": scores.rank_correlations,
        "its ceiling on this grid": scores.rank_ceilings,
    }.items():
        table.add_row(what, *(f"{value:.4g}" for value in row))
    _print_whole(table)
    if scores.outside:
        errors.print(
            f"{scores.outside} of {scores.points} points do not exceed the reference in every objective "
            "and add no volume; --reference sets another.",
            style="yellow",
            soft_wrap=True,
            highlight=False,
        )


def _print_scores(reports: Sequence["FrontReport"], rule: str) -> None:
    table = Table("adapter", "hypervolume", "inner product", "sparsity", "spacing", "non-dominated")
    for report in reports:
        scores = report.scores
        volume = f"{scores.hypervolume:.6g}"
        if scores.hypervolume_interval is not None:
            low, high = scores.hypervolume_interval
            volume += f" (95 %: {low:.6g} to {high:.6g})"
        numbers = (f"{x:.4g}" for x in (scores.inner_product, scores.sparsity, scores.spacing))
        table.add_row(Text(report.name), volume, *numbers, f"{scores.non_dominated} of {scores.points}")
    _print_whole(table)
    console.print(f"reference point: {rule}", markup=False, highlight=False)


def _print_whole(table: Table) -> None:
    """As wide as it needs: a digit that is cut off would be a wrong number."""
    unbounded = console.options.update(max_width=10_000)
    needed = Measurement.get(console, unbounded, table).maximum
    Console(width=max(needed, console.width)).print(table)
