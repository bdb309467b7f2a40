"""Why tasks of the queue failed, as far as this process knows: in memory only, while the tasks wait."""

import threading
from collections import OrderedDict
from collections.abc import Collection

from persona_sdk.memory.pending import Waiting
from persona_sdk.memory.reports import Failure

MOST = 1000  # errors kept; beyond, the oldest go

Key = tuple[str, str, str]  # owner, cube id, task


class FlushErrors:
    """The last error of each task that failed and still waits; thread-safe.

    An error may quote the turn it is about, so what is done or forgotten has none.
    """

    def __init__(self) -> None:
        self._texts: OrderedDict[Key, str] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many errors are kept."""
        return len(self._texts)

    def note(self, failures: Collection[Failure]) -> None:
        """Keep the errors of a flush. Call `keep` after it, with what waits then."""
        with self._lock:
            for failure in failures:
                key = failure.owner, failure.cube_id, failure.task
                self._texts[key] = failure.error
                self._texts.move_to_end(key)
            while len(self._texts) > MOST:
                self._texts.popitem(last=False)

    def keep(self, owner: str, waiting: Collection[Waiting]) -> None:
        """Let go of the owner's errors of tasks that do not wait any more: done, or forgotten meanwhile."""
        there = {_key(owner, task) for task in waiting}
        self._drop([key for key in list(self._texts) if key[0] == owner and key not in there])

    def of(self, owner: str, task: Waiting) -> str:
        """Why a task failed last, "" if this process does not know."""
        with self._lock:
            return self._texts.get(_key(owner, task), "")

    def drop(self, owner: str) -> None:
        """Let go of an owner's errors, as when something of it was forgotten."""
        self._drop([key for key in list(self._texts) if key[0] == owner])

    def _drop(self, keys: Collection[Key]) -> None:
        with self._lock:
            for key in keys:
                self._texts.pop(key, None)


def _key(owner: str, task: Waiting) -> Key:
    return owner, task.cube_id, task.task
