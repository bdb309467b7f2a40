"""A thread that flushes whenever there may be something to do, and once when it starts."""

import logging
import threading
from collections.abc import Callable

logger = logging.getLogger("persona_sdk.memory")


class FlushWorker:
    """Calls `flush` in a thread of its own after each `wake`, from `start` to `close`."""

    def __init__(self, flush: Callable[[], object]) -> None:
        self._flush = flush
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        """There may be something to do."""
        self._wake.set()

    def start(self) -> None:
        """Begin, with what waits already, as after a crash; nothing happens if it runs."""
        if self._thread is None:
            self._stop.clear()
            self._wake.set()
            self._thread = threading.Thread(target=self._work, name="persona-memory-writer", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while not self._stop.is_set():
            self._wake.wait()
            self._wake.clear()
            if self._stop.is_set():
                return
            try:
                self._flush()
            except Exception:  # the thread outlives a full disk, and what waits is in the queue
                logger.exception("the memory writer could not flush; what waits stays in the queue")

    def close(self) -> None:
        """Stop after the flush it is in."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stop.set()
            self._wake.set()
            thread.join()
