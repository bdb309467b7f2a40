"""A million memories of ten thousand personas on one machine: writing, opening, recall, erasing one persona.

    ingest       memories a second through `MemoryStore.commit`, embeddings given
    retrieval    milliseconds of `Retriever.recall` and `VectorIndex.search`, the query's vector given
    recall       share of the ten nearest of a persona that `VectorIndex.search` finds, against brute force
                 over vectors made anew from the seed
    erasing      seconds of `forget_everything` for 1,000 memories, compaction included

The bars of retrieval take personas drawn uniformly, after one pass over everybody, with slices within
the index's budget. Cold slices, and the default budget, stand beside. The same personas are searched in
stores of 10 to all personas. Peers: one flat index over everybody that fetches 2k and then filters, as
mem0's FAISS store does, and mem0 itself if an interpreter that has it is named
(`benchmarks.peers.mem0_rows`).

With ``--resume`` the stores stay in that folder.
"""

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from benchmarks.harness import Bar, Row
from benchmarks.memory import Part, Run
from benchmarks.memory_population import DIMENSION, ENCODER, Population, build, drafts, owner
from benchmarks.peers import mem0_rows
from benchmarks.timing import median_interval
from persona_sdk.memory import MemoryStore, Retriever, VectorIndex

K = 10
WARM_BUDGET = 4 << 30  # bytes of slices: all of a million memories
DEFAULT = "default budget"
GLOBAL_USERS = 1000  # personas in the global index


class Prepared:
    """An encoder of queries whose vectors are known, so that no model is timed."""

    fingerprint = ENCODER

    def __init__(self) -> None:
        self.known: dict[str, torch.Tensor] = {}

    def encode(self, texts: list[str]) -> torch.Tensor:
        return torch.stack([self.known[text] for text in texts])


def measure(run: Run) -> Part:
    """See the module."""
    whole = Population(200, 20_000) if run.quick else Population(10_000, 1_000_000)
    part = Part()
    with ExitStack() as stack:
        place = run.cells.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="scale-")))
        by_tenants: list[Row] = []
        tenants = [n for n in (10, 100, 1000) if n < whole.users]
        for users in (*tenants, whole.users):
            population = whole if users == whole.users else whole.first(users)
            folder = place / f"store-{population.name}"
            written, seconds = build(population, folder, run.cells, run.tell)
            key = f"scale-{population.name}-tenants"
            seen = run.cells.run(key, lambda p=population, f=folder: _tenants(p, f))
            by_tenants.append({"tenants": users, "memories": population.memories, **seen})
        part.tables["memory: the same ten personas among more"] = by_tenants
        _storage(part, whole, folder, written, seconds, run)
        _retrieval(part, whole, folder, run)
        _peers(part, whole, place, run)
        _erasing(part, whole, folder, run)
    part.bars["scale_recall_worst"] = Bar.of(min(float(row["recall"]) for row in by_tenants), ">=", 1.0)
    return part


# Storage ----------------------------------------------------------------------------------------------


def _storage(
    part: Part, population: Population, folder: Path, written: int, seconds: float, run: Run
) -> None:
    def opened() -> dict[str, Any]:
        with MemoryStore.open(folder):
            pass  # a first time, which may have to make up for an interrupted run
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        times = []
        for _ in range(5):
            begun = time.perf_counter()
            MemoryStore.open(folder).close()
            times.append(time.perf_counter() - begun)
        return {"bytes": size, "open": times}

    found = run.cells.run(f"scale-{population.name}-storage", opened)
    part.bars["scale_open_s"] = Bar.of(float(np.median(found["open"])), "<=", 1.0)
    sample = range(min(100, population.users))
    texts = sum(len(text) for user in sample for text in population.texts(user))
    part.tables["memory: storage"] = [
        {
            "memories": population.memories,
            "personas": population.users,
            "ingest_per_s": written / seconds if seconds else None,
            "bytes_per_memory": found["bytes"] / population.memories,
            "of_which_vector": 4 * DIMENSION,
            "of_which_text": texts / sum(population.sizes[: len(sample)]),
            "open_s": float(np.median(found["open"])),
        }
    ]


# Retrieval --------------------------------------------------------------------------------------------


class _Bench:
    """One opened store and timed calls on it."""

    def __init__(self, population: Population, store: MemoryStore, budget: int | None) -> None:
        self.population, self.store, self.encoder = population, store, Prepared()
        self.index = VectorIndex(store) if budget is None else VectorIndex(store, max_bytes=budget)
        self.retriever = Retriever(store, self.index, self.encoder)

    def queries(self, users: Sequence[int], number: int) -> list[tuple[int, str, torch.Tensor]]:
        made = []
        for user in users:
            text, vector = self.population.query(user, number)
            tensor = torch.from_numpy(vector)
            self.encoder.known[text] = tensor
            made.append((user, text, tensor))
        return made

    def search(self, user: int, vector: torch.Tensor) -> list[tuple[str, float]]:
        return self.index.search(owner(user), vector, K, encoder=ENCODER)

    def timed(self, users: Sequence[int], number: int, way: str) -> list[float]:
        """Milliseconds of each call."""
        times = []
        for user, text, vector in self.queries(users, number):
            begun = time.perf_counter()
            if way == "search":
                self.search(user, vector)
            else:
                self.retriever.recall((owner(user),), text, K)
            times.append(1e3 * (time.perf_counter() - begun))
        return times

    def recall(self, users: Sequence[int], number: int) -> float:
        """Worst share of the true nearest that a search found."""
        shares = []
        for user, _, vector in self.queries(users, number):
            order = {cube.id: row for row, cube in enumerate(self.store.cubes(owner(user)))}
            found = {order[name] for name, _ in self.search(user, vector)}
            truth = self.population.nearest(user, vector.numpy(), K)
            shares.append(len(found & truth) / len(truth))
        return min(shares)


def _row(times: Sequence[float]) -> Row:
    low, high = median_interval(times, resamples=1000)
    p50, p95, p99 = (float(np.percentile(times, q)) for q in (50, 95, 99))
    return {"p50_ms": p50, "low": low, "high": high, "p95_ms": p95, "p99_ms": p99, "calls": len(times)}


def _tenants(population: Population, folder: Path) -> dict[str, Any]:
    with MemoryStore.open(folder) as store:
        bench = _Bench(population, store, WARM_BUDGET)
        chosen = list(range(min(10, population.users)))
        recall = bench.recall(chosen, 0)
        found: dict[str, Any] = {"recall": recall}
        for way in ("search", "recall"):
            bench.timed(chosen, 1, way)
            times = [t for number in range(2, 32) for t in bench.timed(chosen, number, way)]
            found |= {f"{way}_p{q}_ms": float(np.percentile(times, q)) for q in (50, 95)}
    return found


def _retrieval(part: Part, population: Population, folder: Path, run: Run) -> None:
    dice = np.random.default_rng(7)
    count = min(2000, 10 * population.users)
    drawn = [int(user) for user in dice.integers(population.users, size=count)]

    def go(state: str, way: str) -> dict[str, Any]:
        run.tell(f"scale: {way}, {state}")
        with MemoryStore.open(folder) as store:
            bench = _Bench(population, store, None if state == DEFAULT else WARM_BUDGET)
            if state == "cold":
                # Nothing of a persona is in memory yet; the system's own cache of the file is as it is.
                once = list(dict.fromkeys(drawn))[:500]
                return {"ms": bench.timed(once, 1, way)}
            # Everybody, not only who is drawn: else few slices are held and the default budget is never met.
            bench.timed([int(user) for user in dice.permutation(population.users)], 1, way)
            return {"ms": bench.timed(drawn, 2, way), "bytes": bench.index.bytes}

    table: list[Row] = []
    for way in ("recall", "search"):
        for state in ("warm", DEFAULT, "cold"):
            key = f"scale-{population.name}-{way}-{state.replace(' ', '-')}-all"
            found = run.cells.run(key, lambda s=state, w=way: go(s, w))
            name = "Retriever.recall" if way == "recall" else "VectorIndex.search"
            size = found.get("bytes")
            row: Row = {"call": name, "slices": state, **_row(found["ms"])}
            table.append(row | {"slices_mib": None if size is None else size / 2**20})
            if (way, state) == ("recall", "warm"):
                p50, low, high, p95 = (float(str(row[q])) for q in ("p50_ms", "low", "high", "p95_ms"))
                part.bars["scale_retrieval_p50_ms"] = Bar.of(p50, "<=", 0.5, interval=(low, high))
                part.bars["scale_retrieval_p95_ms"] = Bar.of(p95, "<=", 2.0)
    part.tables["memory: retrieval"] = table

    def exact() -> dict[str, Any]:
        with MemoryStore.open(folder) as store:
            return {"recall": _Bench(population, store, WARM_BUDGET).recall(drawn[:200], 3)}

    found = run.cells.run(f"scale-{population.name}-exact", exact)
    part.bars["scale_recall"] = Bar.of(found["recall"], ">=", 1.0)


# Peers ------------------------------------------------------------------------------------------------


def _peers(part: Part, whole: Population, place: Path, run: Run) -> None:
    population = whole if whole.users <= GLOBAL_USERS else whole.first(GLOBAL_USERS)
    dice = np.random.default_rng(8)
    users = [int(user) for user in dice.integers(population.users, size=100)]
    rows: list[Row] = []

    def ours() -> dict[str, Any]:
        with MemoryStore.open(place / f"store-{population.name}") as store:
            bench = _Bench(population, store, WARM_BUDGET)
            bench.timed(users, 1, "search")
            return {"ms": bench.timed(users, 4, "search"), "recall": bench.recall(users, 4)}

    def row(name: str, found: dict[str, Any]) -> None:
        shape = {"memories": population.memories, "personas": population.users}
        rows.append({"way": name, **shape, **_row(found["ms"]), "recall_at_10": found["recall"]})

    found = run.cells.run(f"scale-{population.name}-slices", ours)
    row("a slice per persona, VectorIndex.search; worst recall", found)
    found = run.cells.run(f"scale-{population.name}-global", lambda: _global(population, users))
    row("one flat index, fetch 2k, then filter; mean recall", found)
    python = mem0_rows.interpreter()
    if python is None:
        part.notes.append(mem0_rows.ABSENT)
    else:
        run.tell("scale: mem0")
        found = run.cells.run(
            f"scale-{population.name}-mem0", lambda: mem0_rows.measured(python, population, users, K)
        )
        row(f"mem0 {found['version']}, FAISS store, no language model; mean recall", found)
    part.tables["memory: one index for everybody"] = rows


def _global(population: Population, users: Sequence[int]) -> dict[str, Any]:
    """mem0's pattern: one index over everybody, twice as many hits as wanted, filtered afterwards."""
    flat = faiss.IndexFlatIP(DIMENSION)
    owners: list[int] = []
    for user in range(population.users):
        vectors = population.vectors(user)
        flat.add(vectors)
        owners += [user] * len(vectors)
    times, shares = [], []
    for user in users:
        _, query = population.query(user, 4)
        begun = time.perf_counter()
        _, hits = flat.search(query[None], 2 * K)
        mine = [int(hit) for hit in hits[0] if owners[hit] == user][:K]
        times.append(1e3 * (time.perf_counter() - begun))
        first = owners.index(user)
        truth = population.nearest(user, query, K)
        shares.append(len({hit - first for hit in mine} & truth) / len(truth))
    return {"ms": times, "recall": float(np.mean(shares))}


# Erasing ----------------------------------------------------------------------------------------------


def _erasing(part: Part, population: Population, folder: Path, run: Run) -> None:
    def go() -> dict[str, Any]:
        run.tell("scale: erasing a persona of 1,000 memories")
        times, scrubbed = [], []
        sample = Population(3, 3000, seed=9)
        with MemoryStore.open(folder) as store:
            for number in range(3):
                dice = np.random.default_rng((9, number))
                vectors = dice.standard_normal((1000, DIMENSION), dtype=np.float32)
                words = (sample.texts(0) * 1000)[:1000]
                name = f"erased-{number}"
                if name not in {persona.id for persona in store.personas()}:
                    store.commit(name, add=drafts(vectors, words))
                begun = time.perf_counter()
                receipt = store.forget_everything(name)
                times.append(time.perf_counter() - begun)
                scrubbed.append(receipt.scrubbed and receipt.verify(store))
        return {"seconds": times, "scrubbed": all(scrubbed)}

    found = run.cells.run(f"scale-{population.name}-erasing", go)
    part.bars["scale_erase_1000_s"] = Bar.of(max(found["seconds"]), "<=", 1.0)
    part.notes.append(
        f"Erasing 1,000 memories out of {population.memories:,}, compaction included: "
        f"{', '.join(f'{s:.2f} s' for s in found['seconds'])}; "
        f"{'every receipt was scrubbed and verified' if found['scrubbed'] else 'a receipt was NOT scrubbed'}."
    )
