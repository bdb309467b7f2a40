"""Forgets alice's cubes in the store at ``sys.argv[1]`` and kills itself at the step ``sys.argv[2]``."""

import os
import signal
import sys
from pathlib import Path

from persona_sdk.memory import MemoryStore, checkpoint, erasure
from persona_sdk.memory.core import StoreCore


def die(*_args: object, **_options: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


PLACES = {
    "after the transaction": (StoreCore, "announce"),
    "before blobs are deleted": (StoreCore, "drop_unnamed"),
    "before the scrub": (StoreCore, "scrub"),
    "before pages are cleaned": (checkpoint, "overwrite_gaps"),
    "before the WAL is wiped": (checkpoint, "wipe_wal"),
    "after the scrub": (erasure.derived, "retrainable"),
}


def main(folder: Path, step: str) -> None:
    store = MemoryStore.open(folder)
    ids = [cube.id for cube in store.all_cubes("alice")]
    owner, name = PLACES[step]
    setattr(owner, name, die)
    store.forget("alice", ids)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
