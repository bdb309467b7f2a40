"""The handle of one submitted request: tokens as they come, the whole result, cancelling, steering.

    for token in generation: ...            sync          generation.result(timeout=30)
    async for token in generation: ...      async         await generation.aresult()
    generation.steer({0: gate}); generation.cancel()      from any thread, at any time

The worker writes, any number of threads and event loops read. Tokens are kept, so a slow reader never
stalls the engine.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import suppress

from persona_sdk.engine.request import Completion, Request
from persona_sdk.errors import CompositionError, EngineError, PersonaError

logger = logging.getLogger("persona_sdk.engine")


class Generation:
    """One request in the engine. Made by `Engine.submit`.

    Attributes:
        request: what was asked.
        submitted: `time.perf_counter` when it was submitted; `admitted` and `first_token` likewise,
            None until then.
    """

    def __init__(self, request: Request, wake: Callable[[], None]) -> None:
        self.request = request
        self.submitted = time.perf_counter()
        self.admitted: float | None = None
        self.first_token: float | None = None
        self._wake = wake
        self._changed = threading.Condition()
        self._tokens: list[int] = []
        self._completion: Completion | None = None
        self._listeners: list[Callable[[], None]] = []
        self._cancelled = False
        self._gates: dict[int, tuple[float, ...]] = {}

    # For readers ----------------------------------------------------------------------------------------

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens so far."""
        with self._changed:
            return tuple(self._tokens)

    @property
    def done(self) -> bool:
        """Whether the row has ended, well or not."""
        return self._completion is not None

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the end. An error of the row is in the completion, not raised.

        Raises:
            TimeoutError: not done after `timeout` seconds; the row goes on.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._completion is not None, timeout):
                raise TimeoutError(f"The generation is not done after {timeout} s.")
            assert self._completion is not None
            return self._completion

    async def aresult(self) -> Completion:
        """`result` for event loops. If the waiting task is cancelled, so is the row."""
        with suppress(PersonaError):  # it is in the completion
            async for _ in self:
                pass
        assert self._completion is not None
        return self._completion

    def __iter__(self) -> Iterator[int]:
        """Tokens as they are made, from the first. Leaving the loop early cancels the row.

        Raises:
            PersonaError: the row ended with an error, after the tokens it had made.
        """
        given = 0
        try:
            while True:
                with self._changed:
                    while len(self._tokens) == given and not self.done:
                        self._changed.wait()
                    fresh = self._tokens[given:]
                yield from fresh
                given += len(fresh)
                if self.done and given == len(self._tokens):
                    break
        finally:
            self.cancel()  # no effect on a row that is done
        self._raise()

    async def __aiter__(self) -> AsyncIterator[int]:
        """Tokens as they are made. Leaving the loop early, or cancelling its task, cancels the row."""
        loop, news, given = asyncio.get_running_loop(), asyncio.Event(), 0

        def tell() -> None:
            with suppress(RuntimeError):  # the event loop was closed meanwhile: nobody is listening
                loop.call_soon_threadsafe(news.set)

        self.listen(tell)
        try:
            while True:
                news.clear()
                fresh, done = self.tokens[given:], self.done
                for token in fresh:
                    yield token
                given += len(fresh)
                if done and given == len(self._tokens):
                    break
                await news.wait()
        finally:
            self.cancel()
        self._raise()

    def listen(self, callback: Callable[[], None]) -> None:
        """Call back on every change, and once now. The worker calls: do not block, do not raise."""
        with self._changed:
            self._listeners.append(callback)
        callback()

    def cancel(self) -> None:
        """End the row before its next token; its tokens so far stay. No effect on one that is done."""
        if not self.done:
            self._cancelled = True
            self._wake()

    def steer(self, gates: Mapping[int, Sequence[float]]) -> None:
        """Change gates of the row from its next token on.

        Args:
            gates: new gate by the number of the low-rank patch in the plan, from 0.

        Raises:
            CompositionError: no such patch, or a gate of another length or with NaN.
            EngineError: the row has ended.
        """
        patches = self.request.plan.low_rank
        fresh = {}
        for number, values in gates.items():
            gate = tuple(float(value) + 0.0 for value in values)
            if not 0 <= number < len(patches):
                raise CompositionError(
                    f"The plan has {len(patches)} low-rank patches, none with number {number}.",
                    hint="Numbers count from 0 in the plan's order.",
                )
            if len(gate) != patches[number].rank or not all(abs(value) < float("inf") for value in gate):
                raise CompositionError(
                    f"The new gate of {patches[number].origin!r} is {gate}.",
                    hint=f"Expected {patches[number].rank} finite numbers.",
                )
            fresh[number] = gate
        with self._changed:
            if self.done:
                raise EngineError("The reply is complete.", hint="Steer while it is being generated.")
            self._gates |= fresh
        self._wake()

    def _raise(self) -> None:
        if self._completion is not None and self._completion.error is not None:
            raise self._completion.error

    # For the worker -------------------------------------------------------------------------------------

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked to end the row."""
        return self._cancelled

    def take_gates(self) -> dict[int, tuple[float, ...]]:
        """Gates to apply before the next token, once."""
        if not self._gates:
            return {}
        with self._changed:
            gates, self._gates = self._gates, {}
        return gates

    def emit(self, token: int) -> None:
        """Add a token."""
        if self.first_token is None:
            self.first_token = time.perf_counter()
        with self._changed:
            self._tokens.append(token)
            self._changed.notify_all()
        self._tell()

    def finish(self, completion: Completion, last: int | None = None) -> None:
        """End the row, once, with its last token if it has one more."""
        with self._changed:
            if self._completion is not None:
                return
            if last is not None:
                self.first_token = self.first_token or time.perf_counter()
                self._tokens.append(last)
            self._completion = completion
            self._changed.notify_all()
        self._tell()

    def _tell(self) -> None:
        for listener in tuple(self._listeners):
            try:
                listener()
            except Exception:
                logger.exception("a listener of a generation failed")
