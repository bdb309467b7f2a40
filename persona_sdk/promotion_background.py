"""Promotion in the background: one thread of the lowest priority takes the same steps again and again."""

import logging
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TypeAlias

from persona_sdk.errors import PersonaError
from persona_sdk.promotion_outcome import Outcome

_KEPT = 1000  # outcomes and errors

# (persona id, check=...): does what is to be done for one persona. `check` is called between small steps.
Run: TypeAlias = Callable[..., Iterable[Outcome]]

_log = logging.getLogger("persona_sdk.promotion")


class StoppedError(Exception):
    """The work was told to end."""


class Background:
    """One thread that promotes and demotes. Made by `Promoter.run_in_background`; a context manager.

    Args:
        run: the work for one persona.
        persona_ids: for whom, asked at every round.
        interval: seconds between two rounds.

    ``errors`` and ``outcomes`` are what happened last, oldest first.
    """

    def __init__(self, run: Run, persona_ids: Callable[[], Iterable[str]], interval: float) -> None:
        self.errors: list[Exception] = []
        self.outcomes: list[Outcome] = []
        self._run, self._ids, self._interval = run, persona_ids, interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="persona-promotion", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        """Whether the thread is alive."""
        return self._thread.is_alive()

    def stop(self, timeout: float | None = None) -> None:
        """End the work at its next small step and wait for that; nothing half-done is left in the store."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _check(self) -> None:
        if self._stop.is_set():
            raise StoppedError

    def _work(self) -> None:
        _lower_priority()
        with suppress(StoppedError):
            while not self._stop.is_set():
                try:
                    for persona_id in self._ids():
                        self._one(persona_id)
                except PersonaError as error:  # the store is closed, for one
                    self._failed("reading the store", error)
                self._stop.wait(self._interval)

    def _one(self, persona_id: str) -> None:
        try:
            self.outcomes += self._run(persona_id, check=self._check)
            del self.outcomes[:-_KEPT]
        except StoppedError:
            raise
        except Exception as error:  # whatever it was, the next persona is not to suffer from it
            self._failed(f"promoting for {persona_id!r}", error)

    def _failed(self, what: str, error: Exception) -> None:
        _log.error("%s failed: %s", what, error, exc_info=error)
        self.errors.append(error)
        del self.errors[:-_KEPT]


def _lower_priority() -> None:
    """Give this thread the lowest priority, where threads have one of their own."""
    with suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
