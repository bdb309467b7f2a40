"""A process that forks writers, so that `memory_crash` can kill one at any moment without paying for imports.

A line on stdin of store, log, archive and seed, with tabs between, forks a writer and prints its pid; a line
``wait`` prints the exit status of the next writer that ends. A writer makes one random write after another.
It appends a JSON line to the log before each, which says all there is to know of it, and one after it has
returned.
"""

import json
import os
import random
import sys
import uuid
from collections.abc import Callable
from typing import Any

import torch

from persona_sdk.memory import CubeDraft, MemoryStore, Source

OWNERS = ("alice", "bob")
ENCODER, DIMENSION = "crash", 16
WEIGHTS = {"commit": 8, "rollback": 2, "forget": 3, "add_vectors": 2, "import": 2, "forget_everything": 1}
Log = Callable[[dict[str, Any]], None]


class Writer:
    """Random writes on one store."""

    def __init__(self, store: MemoryStore, log: Log, archive: str, seed: int) -> None:
        self.store, self.log, self.archive, self.dice = store, log, archive, random.Random(seed)

    def step(self) -> None:
        """One write, if what was drawn is possible now."""
        (kind,) = self.dice.choices(list(WEIGHTS), list(WEIGHTS.values()))
        getattr(self, f"_{kind}")(self.dice.choice(OWNERS))

    def _text(self) -> str:
        return f"{uuid.UUID(int=self.dice.getrandbits(128))} " * self.dice.choice((1, 3, 60))

    def _vector(self) -> torch.Tensor:
        values = torch.tensor([self.dice.gauss(0, 1) for _ in range(DIMENSION)])
        return torch.nn.functional.normalize(values, dim=0)

    def _commit(self, owner: str) -> None:
        live = [cube.id for cube in self.store.cubes(owner)]
        retire = self.dice.sample(live, min(len(live), self.dice.randrange(3)))
        other = [cube for name in OWNERS for cube in self.store.cubes(name)]
        drafts, described = [], []
        for _ in range(self.dice.randrange(1, 4)):
            sources = self.dice.sample(other, 1) if other and self.dice.random() < 0.25 else []
            links = tuple(Source.of(cube) for cube in sources)
            about = {"sources": [[cube.owner, cube.id] for cube in sources]}
            if self.dice.random() < 0.3:
                weight = self.dice.random()
                payload = {"w": torch.full((32, 32), weight)}
                drafts.append(CubeDraft.of(kind="parametric", payload=payload, sources=links))
                described.append(about | {"weight": float(payload["w"][0, 0])})
            else:
                text, bare = self._text(), self.dice.random() < 0.3
                options: dict[str, Any] = {} if bare else {"vector": self._vector(), "encoder": ENCODER}
                drafts.append(CubeDraft.of(text, sources=links, **options))
                described.append(about | {"text": text, "embedded": not bare})
        self.log({"begin": "commit", "owner": owner, "add": described, "retire": retire})
        revision = self.store.commit(owner, add=drafts, retire=retire)
        self.log({"done": "commit", "number": revision.number, "added": revision.added})

    def _rollback(self, owner: str) -> None:
        if head := self.store.head(owner):
            target = self.dice.randrange(head + 1)
            self.log({"begin": "rollback", "owner": owner, "to": target})
            self.log({"done": "rollback", "number": self.store.rollback(owner, target).number})

    def _forget(self, owner: str) -> None:
        if known := [cube.id for cube in self.store.all_cubes(owner)]:
            ids = self.dice.sample(known, min(len(known), self.dice.randrange(1, 3)))
            self.log({"begin": "forget", "owner": owner, "ids": ids})
            self.log({"done": "forget", "receipt": self.store.forget(owner, ids).to_json()})

    def _add_vectors(self, owner: str) -> None:
        if bare := [cube.id for cube in self.store.missing_vectors(owner, ENCODER)]:
            self.log({"begin": "add_vectors", "owner": owner, "ids": bare})
            written = self.store.add_vectors(owner, ENCODER, {name: self._vector() for name in bare})
            self.log({"done": "add_vectors", "written": written})

    def _import(self, _: str) -> None:
        name = f"import-{self.dice.getrandbits(48):x}"
        self.log({"begin": "import", "owner": name})
        self.store.import_archive(self.archive, as_id=name)
        self.log({"done": "import"})

    def _forget_everything(self, _: str) -> None:
        if found := [persona.id for persona in self.store.personas() if persona.id.startswith("import-")]:
            name = self.dice.choice(found)
            self.log({"begin": "forget_everything", "owner": name})
            receipt = self.store.forget_everything(name)
            self.log({"done": "forget_everything", "receipt": receipt.to_json()})


def work(store_path: str, log_path: str, archive: str, seed: int) -> None:
    handle = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def log(line: dict[str, Any]) -> None:
        os.write(handle, json.dumps(line).encode() + b"\n")

    with MemoryStore.open(store_path, busy_timeout=60) as store:
        writer = Writer(store, log, archive, seed)
        while True:
            writer.step()


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        if line == "wait\n":
            print(os.wait()[1], flush=True)
            continue
        store_path, log_path, archive, seed = line.rstrip("\n").split("\t")
        pid = os.fork()
        if pid == 0:
            try:
                work(store_path, log_path, archive, int(seed))
            finally:
                os._exit(1)  # it is to be killed, so whatever ends it before is a failure
        print(pid, flush=True)


if __name__ == "__main__":
    main()
