"""The engine: one loop in one worker thread, and every way to ask it for tokens.

    submit ──► Generation           iterate it, await it, cancel it, steer it
    generate, stream, logits        conveniences on top

Requests join and leave between steps; each row gets what it would get alone. The worker starts with the
first request and ends when there is nothing to do, so an idle engine holds no thread.
"""

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from queue import SimpleQueue
from typing import ClassVar
from weakref import WeakSet

import torch
from jaxtyping import Float
from torch import Tensor

from persona_sdk.engine.checks import check_patch, check_request
from persona_sdk.engine.forward.select import forward_of
from persona_sdk.engine.generation import Generation
from persona_sdk.engine.loop import Loop, SpillFactory
from persona_sdk.engine.options import EngineOptions
from persona_sdk.engine.prefix.blocks import block_cache
from persona_sdk.engine.prefix.cache import PrefixCache
from persona_sdk.engine.request import Completion, Request, Step
from persona_sdk.engine.row import Row
from persona_sdk.engine.steps import FixedSteps
from persona_sdk.errors import DeviceMemoryError, EngineStoppedError, QueueFullError
from persona_sdk.models import LanguageModel
from persona_sdk.tensors import TensorBundle

logger = logging.getLogger("persona_sdk.engine")

_LINGER = 1.0  # seconds an idle worker waits for another request


_open: "WeakSet[Engine]" = WeakSet()


@atexit.register
def _close_all() -> None:
    """A thread must not be in the middle of a product when the interpreter goes."""
    for engine in list(_open):
        engine.close()


class Engine:
    """Executes composition plans on one base model.

    Args:
        model: the base model. `close` leaves it as it was found.
        options: rows, tokens per step and memory budgets.
        spill: makes what is asked for prefixes that are not in memory (`prefix.cache.Spill`), given the shape
            of this model's keys and values and the precision of adapters.
    """

    capabilities: ClassVar[frozenset[str]] = frozenset(
        {"low_rank", "soft_prefix", "kv_prefix", "passages", "decoding_rule"}
    )

    def __init__(
        self,
        model: LanguageModel,
        options: EngineOptions | None = None,
        *,
        spill: SpillFactory | None = None,
    ) -> None:
        self.model = model
        self.options = options or EngineOptions()
        self._spill = spill
        self.branch_precision = ""  # of adapters; known when the loop is
        # There from the start, so that nothing is forgotten while the rest is being built.
        self._prefixes = PrefixCache(self.options.prefix_bytes)
        reused = self.options.block_reuse is not None
        self._blocks = block_cache(self.options.block_bytes) if reused else None
        self._forgetting = threading.Lock()
        self._shapes = model.linear_shapes()
        self._loop: Loop | None = None
        self._stepping = threading.RLock()  # held for the length of a step: who holds it has the loop
        self._inbox: deque[Generation] = deque()
        self._news = threading.Condition()
        self._worker: threading.Thread | None = None
        self._closed = False
        _open.add(self)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ready(self) -> None:
        """Build now what the first request would otherwise wait for: packed weights, kernels, calibration."""
        if self._loop is None:
            with self._stepping:
                self._ready_loop()

    def close(self) -> None:
        """Fail what still runs, end the worker, and take everything off the base model."""
        with self._news:
            self._closed = True
            worker = self._worker
            self._news.notify_all()
        if worker is not None and worker is not threading.current_thread():
            worker.join()
        with self._stepping:
            self._fail_all(EngineStoppedError("The engine was closed.", hint="Open the model again."))
            if self._loop is not None:
                self._loop.close()

    # Asking -------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Generation:
        """Put a request in line and return its handle at once.

        Raises:
            CompositionError, IncompatibleAdapterError, InvalidInputError, PromptTooLongError: the request
                cannot be executed.
            QueueFullError: `EngineOptions.queue_limit` requests are waiting.
            EngineStoppedError: the engine is closed.
        """
        self._check(request)
        self._bring_prefix(request)
        return self._enqueue([request])[0]

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Run all requests and return their completions in order. Raises like `submit`, before any runs; an
        error of one row is in its completion.
        """
        for request in requests:
            self._check(request)
        for request in requests:
            self._bring_prefix(request)
        generations = self._enqueue(requests)
        try:
            return [generation.result() for generation in generations]
        except BaseException:  # the caller was interrupted
            for generation in generations:
                generation.cancel()
            raise

    def stream(self, requests: Sequence[Request]) -> Iterator[Step]:
        """Yield every token as it is made, rows interleaved. Raises like `submit`, at once; a row that fails
        on the way raises here. Leaving the loop early cancels all rows.
        """
        for request in requests:
            self._check(request)
        for request in requests:
            self._bring_prefix(request)
        return self._steps(self._enqueue(requests))

    def logits(self, requests: Sequence[Request]) -> list[Float[Tensor, "_ vocab"]]:
        """Logits at every prompt position of each request, from one mixed pass. Soft vectors are left out."""
        for request in requests:
            self._check(request)
        if not requests:
            return []
        with self.reserved([replace(request, keep_prefix=False) for request in requests]) as (loop, rows):
            lengths = [row.remaining for row in rows]
            new = [row.chunk(length) for row, length in zip(rows, lengths, strict=True)]
            out = loop.forward_pass([row.number for row in rows], new, every=True)
        pieces = torch.split(out, lengths)
        return [
            piece[len(piece) - len(request.prompt) :] for piece, request in zip(pieces, requests, strict=True)
        ]

    def keys_values(self, request: Request) -> TensorBundle:
        """Keys and values of a request's soft prefix and prompt, as a `KVPrefix` or an activation cube holds
        them. Computed in chunks beside what else runs; raises like `submit`, and what the row ends with.
        """
        options = request.plan.options.model_copy(update={"max_new_tokens": 1})
        request = replace(request, plan=replace(request.plan, options=options), export=True)
        completion = self.submit(request).result()
        if completion.error is not None:
            raise completion.error
        assert completion.exported is not None
        return completion.exported

    @contextmanager
    def bench(self, requests: Sequence[Request]) -> Iterator[FixedSteps]:
        """Single passes over fixed rows, to be timed; see `engine.steps`. Nothing else runs meanwhile."""
        for request in requests:
            self._check(request)
        with self.reserved([replace(request, keep_prefix=False) for request in requests]) as (loop, rows):
            steps = FixedSteps(loop, tuple(rows))
            steps.prefill()
            yield steps

    def check(self, request: Request, *, room: bool = True) -> None:
        """Raise unless this engine can execute the request, its adapters' shapes included.

        With ``room=False`` the length of the prompt is left out, to check a plan by itself. `submit` leaves
        the shapes to the loading of the adapters, which then fails that row.
        """
        check_request(request, self.model, self.capabilities, room=room)
        for patch in request.plan.low_rank:
            check_patch(patch, request.tensors[patch.factors], self._shapes)

    def _check(self, request: Request) -> None:
        check_request(request, self.model, self.capabilities)

    def mark(self) -> int:
        """Where forgetting stands now; see `Request`."""
        return self._prefixes.mark()

    def forget(self, scope: str) -> None:
        """Drop what is kept of a scope's prompts, and adapters that no row uses; others at their rows' end.

        Whose an adapter is, the engine does not know. They come back from the store when they are needed.
        """
        # Both count what was forgotten, and always together: one mark holds for both. It is that of the
        # prefixes, which come first: taken in between, it is ahead of the blocks', and keeps nothing there.
        with self._forgetting:
            self._prefixes.forget(scope)
            if self._blocks is not None:
                self._blocks.forget(scope)
        if self._loop is not None:
            self._loop.table.tiers.clear()

    @contextmanager
    def reserved(self, requests: Sequence[Request]) -> Iterator[tuple[Loop, list[Row]]]:
        """Rows of these requests between two steps of the loop, freed at the end. The loop waits."""
        with self._stepping, torch.inference_mode():
            loop = self._ready_loop()
            rows: list[Row] = []
            try:
                for request in requests:
                    row = loop.table.reserve(Generation(request, lambda: None))
                    if row is None:
                        raise DeviceMemoryError(
                            f"There is room for {len(rows)} of {len(requests)} rows now.",
                            hint="Ask for fewer at once, or raise the budgets in EngineOptions.",
                        )
                    rows.append(row)
                yield loop, rows
            finally:
                for row in rows:
                    loop.table.free(row)

    def _bring_prefix(self, request: Request) -> None:
        """Read a kept prefix from disk here, in the caller's thread: the worker must not wait for it."""
        if self._spill is not None and request.keep_prefix and request.scope:
            self.ready()
            self._prefixes.prefetch(request.plan, request.prompt, request.scope)

    # The worker ---------------------------------------------------------------------------------------

    def _enqueue(self, requests: Sequence[Request]) -> list[Generation]:
        generations = [Generation(request, self._wake) for request in requests]
        with self._news:
            if self._closed:
                raise EngineStoppedError("The engine was closed.", hint="Open the model again.")
            waiting = len(self._inbox) + (self._loop.waiting if self._loop else 0)
            if waiting + len(generations) > self.options.queue_limit:
                raise QueueFullError(
                    f"{waiting} requests are waiting; {self.options.queue_limit} may.",
                    hint="Try again in a moment, or raise EngineOptions.queue_limit.",
                )
            self._inbox.extend(generations)
            if self._worker is None or not self._worker.is_alive():  # not alive: in a forked child
                self._worker = threading.Thread(target=self._work, name="persona-engine", daemon=True)
                self._worker.start()
            self._news.notify_all()
        return generations

    def _wake(self) -> None:
        with self._news:
            if self._loop is not None:
                self._loop.stirred = True
            self._news.notify_all()

    def _work(self) -> None:
        try:
            while self._await_work():
                with self._stepping:
                    loop = self._ready_loop()
                    while self._inbox:
                        loop.enqueue(self._inbox.popleft())
                        loop.stirred = True
                    loop.step()
        except BaseException as error:
            logger.exception("the engine's worker died")
            stopped = EngineStoppedError(
                f"The engine's worker died: {error!r}.", hint="Ask again; a new worker starts."
            )
            with self._stepping:
                with self._news:
                    self._worker = None
                self._fail_all(stopped)

    def _await_work(self) -> bool:
        """Wait until there is something to do; False if the worker may end."""
        with self._news:
            until = time.monotonic() + _LINGER
            while not self._inbox and (self._loop is None or self._loop.idle):
                left = until - time.monotonic()
                if self._closed or left <= 0:
                    self._worker = None
                    return False
                self._news.wait(left)
            if self._closed:
                self._worker = None
            return not self._closed

    def _fail_all(self, error: EngineStoppedError) -> None:
        with self._news:
            inbox = list(self._inbox)
            self._inbox.clear()
        for generation in inbox:
            generation.finish(Completion((), "error", error=error))
        if self._loop is not None:
            self._loop.fail_all(error)

    def _ready_loop(self) -> Loop:
        """The loop; made, with all it holds, when it is first needed."""
        if self._closed:
            raise EngineStoppedError("The engine was closed.", hint="Open the model again.")
        if self._loop is None:
            forward = forward_of(self.model, fused=self.options.fused)
            try:
                self._loop = Loop(
                    self.model, forward, self.options, self._prefixes, self._spill, self._blocks
                )
            except BaseException:
                forward.close()
                raise
            self.branch_precision = self._loop.table.branch_precision
        return self._loop

    def _steps(self, generations: Sequence[Generation]) -> Iterator[Step]:
        news: SimpleQueue[int] = SimpleQueue()
        for number, generation in enumerate(generations):
            generation.listen(lambda number=number: news.put(number))  # type: ignore[misc]
        given, live = [0] * len(generations), set(range(len(generations)))
        try:
            while live:
                number = news.get()
                generation = generations[number]
                done, tokens = generation.done, generation.tokens
                for index in range(given[number], len(tokens)):
                    last = done and index == len(tokens) - 1
                    yield Step(number, tokens[index], generation.result().finish_reason if last else None)
                given[number] = len(tokens)
                if done and number in live:
                    live.discard(number)
                    if error := generation.result().error:
                        raise error
        finally:
            for number in live:
                generations[number].cancel()
