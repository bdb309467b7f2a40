"""The mem0 side of `benchmarks.peers.mem0_rows`: a program for mem0's own environment.

It imports nothing of this repository. It reads ``vectors.npy``, ``queries.npy`` and ``work.json`` from the
folder it is given and writes ``found.json``: the rows each search found, and its milliseconds.
"""

import importlib.metadata
import json
import sys
import time
from pathlib import Path

import numpy as np
from mem0 import Memory


class Prepared:
    """An embedder whose vectors are known."""

    def __init__(self) -> None:
        self.known: dict[str, list[float]] = {}

    def embed(self, text: str, memory_action: str | None = None) -> list[float]:
        return self.known[text]

    def embed_batch(self, texts: list[str], memory_action: str | None = None) -> list[list[float]]:
        return [self.known[text] for text in texts]


def main(folder: Path) -> None:
    work = json.loads((folder / "work.json").read_text())
    vectors, queries = np.load(folder / "vectors.npy"), np.load(folder / "queries.npy")
    store = {"path": str(folder / "faiss"), "embedding_model_dims": vectors.shape[1]}
    store |= {"distance_strategy": "cosine", "collection_name": "memories"}
    memory = Memory.from_config(
        {
            "vector_store": {"provider": "faiss", "config": store},
            "history_db_path": str(folder / "history.db"),
        }
    )
    memory.embedding_model = embedder = Prepared()
    payloads = [
        {"data": text, "user_id": owner, "hash": str(row), "created_at": "2026-01-01T00:00:00+00:00"}
        for row, (text, owner) in enumerate(zip(work["texts"], work["owners"], strict=True))
    ]
    memory.vector_store.insert(vectors, payloads, [str(row) for row in range(len(vectors))])
    times, found = [], []
    for warm in (True, False):
        for (owner, text), vector in zip(work["asked"], queries, strict=True):
            embedder.known = {text: [float(x) for x in vector]}
            begun = time.perf_counter()
            hits = memory.search(text, filters={"user_id": owner}, top_k=work["k"], threshold=0.0)
            if not warm:
                times.append(1e3 * (time.perf_counter() - begun))
                found.append([int(hit["id"]) for hit in hits["results"]])
    version = importlib.metadata.version("mem0ai")
    (folder / "found.json").write_text(json.dumps({"ms": times, "rows": found, "version": version}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
