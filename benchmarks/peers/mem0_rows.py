"""mem0 with its FAISS store, in an environment of its own, without a network and without a language model.

The interpreter of that environment is named by ``PERSONA_BENCH_MEM0``; without one mem0 is left out and the
result says so. It takes `mem0ai` and `faiss-cpu`, which conflict with this SDK's pins, so nothing is shared
but files of vectors and texts. mem0 writes its whole index at every insert, so memories are loaded in one.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import BenchmarkError
from benchmarks.memory_population import Population, owner

VARIABLE = "PERSONA_BENCH_MEM0"
ABSENT = f"mem0 was left out: name the interpreter of an environment with mem0ai and faiss-cpu by {VARIABLE}."
_WORKER = Path(__file__).with_name("mem0_worker.py")
_ENVIRONMENT = {"MEM0_TELEMETRY": "False", "OPENAI_API_KEY": "none is called", "HF_HUB_OFFLINE": "1"}


def interpreter() -> str | None:
    """The interpreter of mem0's environment, or None if none is named.

    Raises:
        BenchmarkError: what is named is no program.
    """
    named = os.environ.get(VARIABLE)
    if named and not os.access(named, os.X_OK):
        raise BenchmarkError(f"The interpreter for mem0, {named!r}, cannot be started.")
    return named or None


def measured(python: str, population: Population, users: Sequence[int], k: int) -> dict[str, Any]:
    """Milliseconds of each `Memory.search` and the mean recall of the true nearest, after one warm-up.

    Raises:
        BenchmarkError: mem0 failed.
    """
    with tempfile.TemporaryDirectory(prefix="mem0-") as place:
        folder = Path(place)
        everybody = range(population.users)
        np.save(folder / "vectors.npy", np.concatenate([population.vectors(user) for user in everybody]))
        np.save(folder / "queries.npy", np.stack([population.query(user, 4)[1] for user in users]))
        work = {
            "texts": [text for user in everybody for text in population.texts(user)],
            "owners": [owner(user) for user in everybody for _ in range(population.sizes[user])],
            "asked": [[owner(user), population.query(user, 4)[0]] for user in users],
            "k": k,
        }
        (folder / "work.json").write_text(json.dumps(work))
        home = {"MEM0_DIR": str(folder / "home"), "HOME": str(folder)}
        done = subprocess.run(
            [python, str(_WORKER), str(folder)],
            env={**os.environ, **_ENVIRONMENT, **home},
            capture_output=True,
            text=True,
            timeout=1800,
        )
        if done.returncode:
            tail = "; ".join(done.stderr.strip().splitlines()[-2:])
            raise BenchmarkError(f"mem0 failed: {tail}")
        found = json.loads((folder / "found.json").read_text())
    starts, shares = np.cumsum([0, *population.sizes]), []
    for user, rows in zip(users, found["rows"], strict=True):
        nearest = population.nearest(user, population.query(user, 4)[1], k)
        truth = {int(starts[user]) + row for row in nearest}
        shares.append(len(set(rows) & truth) / len(truth))
    return {"ms": found["ms"], "version": found["version"], "recall": float(np.mean(shares))}
