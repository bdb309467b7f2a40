"""Personas made up for `memory_scale`: how many memories each has, their vectors, their texts, and the store.

    sizes     log-normal, median 30, at most 5,000, scaled to an exact total
    vectors   random unit vectors of 384 numbers: nothing is near anything, the worst case for an index
    texts     8 to 14 words, frequent ones more often, so that the lexical half of recall has work to do

Everything follows from a seed and the persona's number, so that a reference can be worked out without
reading the store.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from benchmarks.harness import BenchmarkError, Cells
from persona_sdk.memory import CubeDraft, MemoryStore

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

DIMENSION = 384
ENCODER = "random-unit-vectors"
MEDIAN, LARGEST = 30, 5000
WORDS = ["".join(parts) for parts in product("bdfgklmnprstvz", "aeiou", "lmnrst", ("", "a", "o", "in"))]
CHUNK = 100  # personas in one cell


@dataclass(frozen=True)
class Population:
    """`users` personas with `memories` memories together. ``name`` says so in keys of cells."""

    users: int
    memories: int
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.memories}x{self.users}-{self.seed}"

    @cached_property
    def sizes(self) -> list[int]:
        """Memories of each persona."""
        mean, dice = self.memories / self.users, np.random.default_rng((self.seed, 0))
        spread = max(2 * np.log(mean / MEDIAN), 0.25) ** 0.5
        draws = np.exp(dice.normal(np.log(MEDIAN), spread, self.users))
        sizes = np.clip(draws, 1, LARGEST).astype(int)
        # What clipping took is given to, or taken from, personas drawn by size, so that the shape stays.
        while missing := self.memories - int(sizes.sum()):
            room = (sizes < LARGEST) if missing > 0 else (sizes > 1)
            weight = sizes * room / (sizes * room).sum()
            np.add.at(sizes, dice.choice(self.users, min(abs(missing), 10_000), p=weight), np.sign(missing))
            sizes = np.clip(sizes, 1, LARGEST)
        return [int(size) for size in sizes]

    def first(self, users: int) -> "Population":
        """The same personas, without those after the first `users`."""
        return _First(users, sum(self.sizes[:users]), self.seed, self)

    def nearest(self, user: int, query: Array, k: int) -> set[int]:
        """Rows of a persona's `k` nearest memories, by brute force."""
        scores = self.vectors(user) @ query
        return {int(row) for row in np.argsort(-scores, kind="stable")[:k]}

    def vectors(self, user: int) -> Array:
        """``[n, d]``, unit length."""
        dice = np.random.default_rng((self.seed, 1, user))
        drawn = dice.standard_normal((self.sizes[user], DIMENSION), dtype=np.float32)
        return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)

    def texts(self, user: int) -> list[str]:
        """One sentence a memory."""
        dice = np.random.default_rng((self.seed, 2, user))
        lengths = dice.integers(8, 15, self.sizes[user])
        picked = (len(WORDS) * dice.random(int(lengths.sum())) ** 3).astype(int)
        return [" ".join(WORDS[i] for i in part) for part in np.split(picked, np.cumsum(lengths)[:-1])]

    def query(self, user: int, number: int) -> tuple[str, Array]:
        """Words of one of the persona's memories, and a random unit vector."""
        dice = np.random.default_rng((self.seed, 3, user, number))
        words = self.texts(user)[int(dice.integers(self.sizes[user]))].split()
        vector = dice.standard_normal(DIMENSION, dtype=np.float32)
        return " ".join(dice.choice(words, 4)), vector / np.linalg.norm(vector)


@dataclass(frozen=True)
class _First(Population):
    whole: Population | None = None

    @cached_property
    def sizes(self) -> list[int]:
        assert self.whole is not None
        return self.whole.sizes[: self.users]


def owner(user: int) -> str:
    """A persona's id."""
    return f"user-{user:05}"


def drafts(vectors: Array, texts: list[str]) -> list[CubeDraft]:
    """Memories as they are committed."""
    rows = torch.from_numpy(vectors)
    return [CubeDraft.of(text, vector=row, encoder=ENCODER) for text, row in zip(texts, rows, strict=True)]


def build(
    population: Population, folder: Path, cells: Cells, tell: Callable[[str], None]
) -> tuple[int, float]:
    """Write the store, one commit a persona, continuing where an earlier run stopped.

    Returns how many memories were written under the clock, and the seconds; making them up is outside.

    Raises:
        BenchmarkError: cells of an earlier run are there, but not its store.
    """
    written, seconds = 0, 0.0
    with MemoryStore.open(folder) as store:
        known = {persona.id for persona in store.personas()}

        def chunk(start: int) -> dict[str, Any]:
            count, spent = 0, 0.0
            for user in range(start, min(start + CHUNK, population.users)):
                if owner(user) in known:
                    continue
                vectors, texts = population.vectors(user), population.texts(user)
                begun = time.perf_counter()
                store.commit(owner(user), add=drafts(vectors, texts))
                spent += time.perf_counter() - begun
                count += len(texts)
            return {"memories": count, "seconds": spent}

        for start in range(0, population.users, CHUNK):
            cell = cells.run(f"scale-{population.name}-ingest-{start // CHUNK:04}", lambda s=start: chunk(s))
            written, seconds = written + cell["memories"], seconds + cell["seconds"]
            if start // CHUNK % 10 == 9:
                tell(f"scale: {start + CHUNK:,} of {population.users:,} personas written")
        found = sum(persona.cubes for persona in store.personas())
    if found < population.memories:
        raise BenchmarkError(f"{folder.name} holds {found:,} memories, not {population.memories:,}.")
    return written, seconds
