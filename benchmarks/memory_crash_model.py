"""What a store must hold after the writes of a log: a plain model, and its comparison with the store.

The last write of a log may have no answer, because its writer was killed. The store may then hold all of it
or nothing; which is read from one sign, and everything else must agree with that.

    lost       something acknowledged is not there
    partial    something is there that no whole write explains, or the database is not sound
    index      a search over everything is not what SQL says
    blobs      a payload is missing or damaged, or a file remains that no row names
    receipts   a receipt of this log does not verify
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.memory_crash_writer import DIMENSION, ENCODER
from persona_sdk.errors import PersonaError
from persona_sdk.memory import MemCube, MemoryStore, Receipt, VectorIndex

KINDS = ("lost", "partial", "index", "blobs", "receipts")
Line = dict[str, Any]


@dataclass
class Persona:
    """``live[n]`` are the ids live at revision n, ``cubes`` what each cube was when it was added."""

    live: list[set[str]] = field(default_factory=lambda: [set()])
    cubes: dict[str, Line] = field(default_factory=dict)


def content(cube: MemCube, store: MemoryStore) -> Line:
    """What is compared of a cube, except its vector."""
    if cube.blob is None:
        return {"text": cube.text}
    return {"weight": float(store.load_blob(cube.owner, cube.blob)["w"].flatten()[0])}


def snapshot(store: MemoryStore, owner: str) -> Persona:
    """A persona as it is in a store; for what was imported."""
    cubes = store.all_cubes(owner)
    numbers = range(store.head(owner) + 1)
    embedded = {name for n in numbers for name in store.vector_ids(owner, ENCODER, revision=n)}
    known = {
        cube.id: content(cube, store)
        | {
            "sources": [[s.owner, s.cube_id] for s in cube.header.sources],
            "embedded": cube.id in embedded,
        }
        for cube in cubes
    }
    return Persona([{c.id for c in store.cubes(owner, revision=n)} for n in numbers], known)


class Model:
    """All personas of a store."""

    def __init__(self, template: Persona) -> None:
        self.personas: dict[str, Persona] = {}
        self._template = template
        self.receipts: list[str] = []

    def replay(self, lines: Sequence[Line], store: MemoryStore) -> None:
        """Apply a log; of its last write only if it was answered, or the store shows that it was made."""
        self.receipts = []
        position = 0
        while position < len(lines):
            begin, answer = lines[position], lines[position + 1] if position + 1 < len(lines) else None
            if answer is not None or self._was_made(begin, store):
                self._apply(begin, answer, store)
            position += 2

    def _was_made(self, begin: Line, store: MemoryStore) -> bool:
        owner, before = begin["owner"], self.personas.get(begin["owner"], Persona())
        match begin["begin"]:
            case "commit" | "rollback":
                return store.head(owner) >= len(before.live)
            case "forget":
                return not store.lookup(owner, begin["ids"])
            case "add_vectors":
                missing = {cube.id for cube in store.missing_vectors(owner, ENCODER)}
                return not missing & set(begin["ids"])
            case "import":
                return store.kind_of(owner) is not None
            case _:
                return store.kind_of(owner) is None

    def _apply(self, begin: Line, answer: Line | None, store: MemoryStore) -> None:
        owner = begin["owner"]
        persona = self.personas.setdefault(owner, Persona())
        if answer is not None and "receipt" in answer:
            self.receipts.append(answer["receipt"])
        match begin["begin"]:
            case "commit":
                added = answer["added"] if answer else [*store.history(owner)[len(persona.live) - 1].added]
                persona.cubes |= dict(zip(added, begin["add"], strict=False))
                persona.live.append(persona.live[-1] - set(begin["retire"]) | set(added))
            case "rollback":
                persona.live.append(set(persona.live[begin["to"]]))
            case "forget":
                self._forget({(owner, name) for name in begin["ids"]})
            case "add_vectors":
                for name in begin["ids"]:
                    persona.cubes[name]["embedded"] = True
            case "import":
                # The archive's ids are kept or replaced; its contents stand in the same order.
                names = [cube.id for cube in store.all_cubes(owner)]
                # What was erased is there again: receipts of it were true until now.
                again = set(names) | set(self._template.cubes)
                self.receipts = [r for r in self.receipts if not again & set(Receipt.from_json(r).cube_ids)]
                renamed = dict(zip(self._template.cubes, names, strict=False))
                known = self._template.cubes.items()
                cubes = {renamed[name]: dict(cube) for name, cube in known if name in renamed}
                live = [{renamed.get(k, k) for k in ids} for ids in self._template.live]
                self.personas[owner] = Persona(live, cubes)
            case _:
                del self.personas[owner]

    def _forget(self, gone: set[tuple[str, str]]) -> None:
        while (
            more := {
                (owner, name)
                for owner, persona in self.personas.items()
                for name, cube in persona.cubes.items()
                if any(tuple(source) in gone for source in cube["sources"])
            }
            - gone
        ):
            gone |= more
        for owner in {owner for owner, _ in gone}:
            persona, ids = self.personas[owner], {name for of, name in gone if of == owner}
            persona.live.append(set(persona.live[-1]))
            persona.live = [names - ids for names in persona.live]
            persona.cubes = {k: v for k, v in persona.cubes.items() if k not in ids}

    # Comparison ---------------------------------------------------------------------------------------

    def faults(self, store: MemoryStore) -> Counter[str]:
        """What of the store is not as it must be, counted by kind; empty when all is well."""
        found: Counter[str] = Counter()
        names = {persona.id for persona in store.personas()}
        wanted = {name for name, persona in self.personas.items() if len(persona.live) > 1}
        found["lost"] += len(wanted - names)
        found["partial"] += len(names - wanted) + _unsound(store)
        for owner in sorted(names & wanted):
            self._compare(store, owner, found)
        for row in self.receipts:
            found["receipts"] += not Receipt.from_json(row).verify(store)
        _compare_blobs(store, found)
        return +found

    def _compare(self, store: MemoryStore, owner: str, found: Counter[str]) -> None:
        persona, head = self.personas[owner], store.head(owner)
        found["lost"] += max(0, len(persona.live) - 1 - head)
        found["partial"] += max(0, head - len(persona.live) + 1)
        numbers = [revision.number for revision in store.history(owner)]
        found["partial"] += numbers != list(range(1, head + 1))
        for number in range(min(head + 1, len(persona.live))):
            there = {cube.id for cube in store.cubes(owner, revision=number)}
            found["lost"] += len(persona.live[number] - there)
            found["partial"] += len(there - persona.live[number])
        cubes = {cube.id: cube for cube in store.all_cubes(owner)}
        found["lost"] += len(persona.cubes.keys() - cubes.keys())
        found["partial"] += len(cubes.keys() - persona.cubes.keys())
        for name in persona.cubes.keys() & cubes.keys():
            try:
                said = content(cubes[name], store)
            except PersonaError:
                found["blobs"] += 1
                continue
            key = "text" if cubes[name].blob is None else "weight"
            found["partial"] += said[key] != persona.cubes[name].get(key)
        embedded = {name for name in persona.live[-1] if persona.cubes.get(name, {}).get("embedded")}
        stored = set(store.vector_ids(owner, ENCODER))
        found["lost"] += len(embedded - stored)
        found["partial"] += len(stored - embedded)
        _compare_index(store, owner, found)


def _compare_index(store: MemoryStore, owner: str, found: Counter[str]) -> None:
    ids, matrix = store.vectors(owner, ENCODER)
    query = torch.nn.functional.normalize(torch.arange(1.0, DIMENSION + 1), dim=0)
    hits = dict(VectorIndex(store).search(owner, query, len(ids) + 5, encoder=ENCODER))
    expected = dict(zip(ids, (matrix @ query).tolist() if ids else [], strict=True))
    same = hits.keys() == expected.keys()
    found["index"] += not same or any(abs(hits[name] - expected[name]) > 1e-5 for name in hits)


def _unsound(store: MemoryStore) -> int:
    """Complaints of SQLite about its file and its foreign keys."""
    with store.reading() as connection:
        said = list(connection.exec_driver_sql("PRAGMA integrity_check").scalars())
        dangling = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
    return (said != ["ok"]) + len(dangling)


def _compare_blobs(store: MemoryStore, found: Counter[str]) -> None:
    """After `MemoryStore.scrub`, which takes what a killed writer left however young it is."""
    owners = [persona.id for persona in store.personas()]
    named = {cube.blob for owner in owners for cube in store.all_cubes(owner) if cube.blob is not None}
    found["blobs"] += sum(not store.vault.holds(name) for name in named)
    store.scrub()
    files = {file.stem for file in store.vault.folder.rglob("*.safetensors")}
    found["blobs"] += len(files - named)
