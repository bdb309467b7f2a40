"""What every benchmark shares: the JSON it writes, the machine it ran on, its command line, resumable cells.

A result holds bars (a number, its interval, a target and whether it was met), tables (lists of rows) and
notes. It names no path and no host: what is compared are numbers, not places.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from rich.console import Console
from rich.table import Table

from persona_sdk.config import FrozenConfig
from persona_sdk.files import write_atomically

Value = str | int | float | bool | None
Row = dict[str, Value]

RESULTS = Path(__file__).parent / "results"


class BenchmarkError(RuntimeError):
    """The run cannot be trusted, so nothing was timed."""


class Bar(FrozenConfig):
    """A measured value against its target. Build with `Bar.of`; `ok` cannot contradict the numbers."""

    value: float
    interval: tuple[float, float] | None = None
    target: float
    op: Literal["<=", ">="]
    ok: bool

    @classmethod
    def of(
        cls,
        value: float,
        op: Literal["<=", ">="],
        target: float,
        *,
        interval: tuple[float, float] | None = None,
    ) -> Self:
        """A bar whose `ok` follows from the numbers."""
        return cls(value=value, interval=interval, target=target, op=op, ok=_met(value, op, target))

    @model_validator(mode="after")
    def _ok_is_what_the_numbers_say(self) -> Self:
        if self.ok != _met(self.value, self.op, self.target):
            raise ValueError(f"ok is {self.ok}, but the bar says {self.value} {self.op} {self.target}")
        return self


def _met(value: float, op: str, target: float) -> bool:
    return value <= target if op == "<=" else value >= target


class Result(FrozenConfig):
    """One finished run, as it is written to disk."""

    name: str
    command: str
    commit: str
    machine: dict[str, Value]
    versions: dict[str, str]
    bars: dict[str, Bar] = Field(default_factory=dict)
    tables: dict[str, list[Row]] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)

    @property
    def quick(self) -> bool:
        """Whether this was a smoke run, which claims nothing."""
        return "--quick" in self.command.split()


def write(result: Result, path: Path) -> None:
    """Write a result whole or not at all, creating its folder."""
    _write_json(path, result.model_dump())


def read(path: Path) -> Result:
    """Read a result; a file that is none raises `pydantic.ValidationError`."""
    return Result.model_validate_json(path.read_bytes())


def _write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())


class Cells:
    """Finished pieces of a run, one JSON file each, so that an interrupted run continues where it stopped.

    Keys become file names; they must say everything the numbers depend on but the commit, which is stored.
    Without a folder nothing is kept.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self.commits: set[str] = set()

    @property
    def folder(self) -> Path | None:
        """Where cells are kept; a part may keep beside them what its cells are about."""
        return self._folder

    def finished(self, key: str) -> dict[str, Any] | None:
        """The stored cell, or None if there is none that can be read."""
        if self._folder is None or not (path := self._folder / f"{key}.json").exists():
            return None
        try:
            stored = json.loads(path.read_text())
            self.commits.add(stored["commit"])
            return dict(stored["cell"])
        except (ValueError, KeyError, TypeError):
            return None

    def run(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The stored cell if there is one, else a fresh one, stored before it is returned."""
        if (stored := self.finished(key)) is not None:
            return stored
        cell, mark = measure(), commit()
        self.commits.add(mark)
        if self._folder is not None:
            _write_json(self._folder / f"{key}.json", {"commit": mark, "cell": cell})
        return cell


def machine() -> dict[str, Value]:
    """What the numbers depend on, without naming the host."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, this SDK, torch, transformers and the packages named."""
    named = ("persona-sdk", "torch", "transformers", *packages)
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in named}}


def commit() -> str:
    """Hash of the checked-out commit, with ``-dirty`` behind it if tracked files differ; else "unknown"."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(
            describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def arguments(name: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options all benchmarks have."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--quick", action="store_true", help="smoke run, under five minutes on two cores")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="repeat with N random draws")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="keep finished cells there and skip them")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="torch threads")
    return parser


def conclude(
    name: str,
    argv: Sequence[str],
    options: argparse.Namespace,
    *,
    bars: Mapping[str, Bar],
    tables: Mapping[str, list[Row]],
    notes: Sequence[str],
    versions: Mapping[str, str],
    cells: Cells | None = None,
) -> Result:
    """Put a run together, show it, and write it where ``--json`` says; `cells` tell if commits were mixed."""
    mixed = sorted(cells.commits) if cells is not None and len(cells.commits) > 1 else []
    said = [f"Cells were measured at several commits: {', '.join(mixed)}."] if mixed else []
    result = Result(
        name=name,
        command=command_line(name, argv),
        commit=commit(),
        machine=machine(),
        versions=dict(versions),
        bars=dict(bars),
        tables=dict(tables),
        notes=[*notes, *said],
    )
    show(result)
    if options.json:
        write(result, options.json)
    return result


def command_line(name: str, argv: Sequence[str]) -> str:
    """The command as others would type it: folders of this machine are cut from its paths."""
    shown = []
    for argument in argv:
        option, equals, value = argument.rpartition("=")
        shown.append(option + equals + (Path(value).name if os.sep in value else value))
    return shlex.join(["python", "-m", f"benchmarks.{name}", *shown])


def number(value: Value) -> str:
    """A value as tables show it: three digits, or whole if it is large."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def verdict(bar: Bar) -> str:
    """``hit`` or ``MISS``."""
    return "hit" if bar.ok else "MISS"


def show(result: Result, console: Console | None = None) -> None:
    """Print bars, tables and notes."""
    console = console or Console()
    if not console.is_terminal:  # a log has no width of its own
        console.width = 130
    bars = Table("bar", "value", "95 % interval", "target", "", title=f"{result.name}: bars")
    for key, bar in result.bars.items():
        interval = "" if bar.interval is None else " to ".join(map(number, bar.interval))
        bars.add_row(key, number(bar.value), interval, f"{bar.op} {number(bar.target)}", verdict(bar))
    console.print(bars)
    for title, rows in result.tables.items():
        if rows:
            table = Table(*rows[0], title=title)
            for row in rows:
                table.add_row(*map(number, row.values()))
            console.print(table)
    for note in result.notes:
        console.print(f"- {note}", highlight=False, markup=False)
