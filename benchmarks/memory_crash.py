"""kill -9 amid mixed writes: commits, rollbacks, forgetting, vectors and imports.

A writer process is killed at a random moment. The store is opened again and compared with a model of what the
writer had said was done (`benchmarks.memory_crash_model`); then the next writer goes on with it. Every
`POINTS` kills begin with a new store, so that interrupted runs continue there. What a writer does follows
from a seed; when it is killed does too, but where that falls depends on the machine.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Bar, BenchmarkError, Row
from benchmarks.memory import Part, Run
from benchmarks.memory_crash_model import KINDS, Line, Model, Persona, snapshot
from benchmarks.memory_crash_writer import ENCODER, WEIGHTS
from persona_sdk.memory import CubeDraft, MemoryStore

POINTS = 25
LINES = 10  # of a writer's log, at most, after which it is killed
SCALES = (0.002, 0.01, 0.05, 0.2)  # seconds: writes take longer on slow disks, and parts of them less
PATIENCE = 60.0


def measure(run: Run) -> Part:
    """See the module."""
    cells = 1 if run.quick else 20
    total: Counter[str] = Counter()
    for number in range(cells):
        found = run.cells.run(f"crash-{POINTS}-{number:02}", lambda n=number: _cell(n))
        total.update(found)
        run.tell(f"crash: {POINTS * (number + 1)} of {POINTS * cells} kills, {_said(total)}")
    part = Part()
    part.bars = {f"crash_{kind}": Bar.of(float(total[kind]), "<=", 0.0) for kind in KINDS}
    row: Row = {key: total[key] for key in ("kills", "acknowledged", "in_flight", *KINDS)}
    part.tables["memory: kill -9 amid mixed writes"] = [row]
    part.tables["memory: what was under way when killed"] = [
        {"write": kind, "kills": total[f"in_flight_{kind}"]} for kind in WEIGHTS
    ]
    return part


def _said(total: Counter[str]) -> str:
    faults = ", ".join(f"{total[kind]} {kind}" for kind in KINDS if total[kind])
    return f"{total['acknowledged']:,} writes acknowledged, {faults or 'nothing wrong'}"


def _cell(number: int) -> dict[str, Any]:
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="crash-") as place, _server() as server:
        folder = Path(place)
        model = Model(template(folder))
        for point in range(POINTS):
            lines = _killed(server, folder, seed=POINTS * number + point)
            with MemoryStore.open(folder / "store") as store:
                model.replay(lines, store)
                total.update(model.faults(store))
            total["kills"] += 1
            total["acknowledged"] += sum("done" in line for line in lines)
            if lines and "begin" in lines[-1]:
                total["in_flight"] += 1
                total[f"in_flight_{lines[-1]['begin']}"] += 1
    return dict(total)


def template(folder: Path) -> Persona:
    """Write the archive that writers import, and return what is in it."""
    drafts = [
        CubeDraft.of("imported text", vector=torch.eye(16)[0], encoder=ENCODER),
        CubeDraft.of("imported bare"),
        CubeDraft.of(kind="parametric", payload={"w": torch.full((32, 32), 0.5)}),
    ]
    with MemoryStore.open(folder / "template") as store:
        first = store.commit("template", add=drafts).added
        more = CubeDraft.of("imported later", vector=torch.eye(16)[1], encoder=ENCODER)
        store.commit("template", add=[more], retire=first[1:2])
        store.rollback("template", 1)
        store.export("template", folder / "template.memcube")
        return snapshot(store, "template")


@contextmanager
def _server() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "benchmarks.memory_crash_writer"]
    root = Path(__file__).parents[1]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root
    ) as server:
        yield server
        assert server.stdin is not None
        server.stdin.close()


def _ask(server: subprocess.Popen[str], line: str) -> int:
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(f"{line}\n")
    server.stdin.flush()
    return int(server.stdout.readline())


def _killed(server: subprocess.Popen[str], folder: Path, seed: int) -> list[Line]:
    """Start a writer, kill it, and return its log."""
    log, dice = folder / f"log-{seed}", random.Random(seed)
    places = (folder / "store", log, folder / "template.memcube")
    pid = _ask(server, "\t".join([*map(str, places), str(seed)]))
    patience = time.monotonic() + PATIENCE
    wanted = dice.randint(1, LINES)
    while not (log.exists() and log.read_bytes().count(b"\n") >= wanted) and time.monotonic() < patience:
        time.sleep(0.001)
    time.sleep(dice.random() * dice.choice(SCALES))
    os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(_ask(server, "wait"))
    if status != -signal.SIGKILL:
        raise BenchmarkError(f"The writer of seed {seed} ended by itself with status {status}.")
    lines = log.read_bytes().split(b"\n") if log.exists() else []
    return [json.loads(line) for line in lines[:-1]]  # the last one is empty, or was cut
