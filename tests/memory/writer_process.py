"""A process that forks writers, so that a test can kill one at any moment without paying for imports.

A line ``<store> <acknowledgements> <owner> <seed>`` on stdin forks a writer and prints its pid. The writer
commits until it is killed, or 15 times, and appends one JSON line to the acknowledgements after each
commit that returned. A line ``wait`` prints the exit status of the next writer that ends.
"""

import json
import os
import random
import sys

import torch

from persona_sdk.memory import CubeDraft, MemoryStore

torch.set_num_threads(1)
COMMITS = 15


def write(store_path: str, acknowledgements: str, owner: str, seed: int) -> None:
    dice = random.Random(seed)
    log = os.open(acknowledgements, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with MemoryStore.open(store_path, busy_timeout=60) as store:
        for _ in range(COMMITS):
            live = [cube.id for cube in store.cubes(owner)]
            retire = dice.sample(live, min(len(live), dice.randrange(3)))
            payload = {"w": torch.full((64, 64), dice.random())}
            drafts = [
                CubeDraft.of(f"{owner} says {dice.random()}", vector=torch.rand(8), encoder="e"),
                CubeDraft.of(kind="parametric", payload=payload),
            ]
            revision = store.commit(owner, add=drafts, retire=retire)
            state = {"number": revision.number, "added": revision.added, "retired": revision.retired}
            os.write(log, json.dumps(state).encode() + b"\n")


def main() -> None:
    for line in sys.stdin:
        if line == "wait\n":
            print(os.wait()[1], flush=True)  # noqa: T201
            continue
        store_path, acknowledgements, owner, seed = line.split()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                write(store_path, acknowledgements, owner, int(seed))
                status = 0
            finally:
                os._exit(status)
        print(pid, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
