"""A process that observes and flushes until it is killed; it says on stdout what it has been promised.

``<store> extract`` kills itself while a turn is read, ``<store> commit`` inside the transaction of a flush,
just before it ends; ``<store> endless`` goes on until somebody else kills it.
"""

import os
import signal
import sys

import torch

from persona_sdk.memory import MemoryStore, pending
from persona_sdk.memory.extraction import RuleExtractor
from persona_sdk.memory.writer import MemoryWriter
from persona_sdk.testing import HashEmbedder

torch.set_num_threads(1)
CITIES = ("Paris", "Lyon", "Oslo", "Rome", "Graz", "Lille", "Nice", "Turin", "Porto", "Ghent")


def die(*args: object, **options: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    folder, mode = sys.argv[1:]
    with MemoryStore.open(folder, busy_timeout=60) as store:
        writer = MemoryWriter(store, HashEmbedder())
        if mode == "endless":
            for number in range(10_000):
                text = f"I live in {CITIES[number % len(CITIES)]}."
                writer.observe("alice", text, session="s", start=number)
                sys.stdout.write(f"{number}\n")
                sys.stdout.flush()
                if number % 3 == 2:
                    writer.flush("alice")
            return
        writer.observe("alice", "I live in Paris.", session="s")
        sys.stdout.write("0\n")
        sys.stdout.flush()
        if mode == "extract":
            RuleExtractor.extract = die  # type: ignore[assignment]
        else:
            finish = pending.finish
            pending.finish = lambda *args: (finish(*args), die())  # type: ignore[assignment,func-returns-value]
        writer.flush("alice")


if __name__ == "__main__":
    main()
