"""An idle subprocess that answers one JSON line per command: a peer that needs an environment of its own.

The peer does nothing between commands, and the caller waits while it works, so the two never compete for
the machine and contenders can take turns across processes as they do within one.
"""

import json
import os
import selectors
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self

from benchmarks.harness import BenchmarkError


class IdleWorker:
    """A subprocess driven over pipes. Use as a context manager, or `close` it.

    Args:
        command: what to start.
        environment: added to this process's.
        log: file for the peer's standard error; its tail explains a failure.
        timeout: seconds a command may take.
    """

    def __init__(
        self, command: Sequence[str], *, environment: Mapping[str, str], log: Path, timeout: float = 300.0
    ) -> None:
        self._log, self._timeout = log, timeout
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **environment},
            )
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._out, selectors.EVENT_READ)
        self._buffer = b""

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Send one command and wait for its answer.

        Raises:
            BenchmarkError: the peer refused, died or did not answer in time.
        """
        try:
            self._in.write((json.dumps({"op": op, **arguments}) + "\n").encode())
            self._in.flush()
        except OSError:
            raise self._failure(op, "has ended") from None
        answer: dict[str, Any] = json.loads(self._line(op))
        if "error" in answer:
            raise self._failure(op, f"answered {answer['error']}")
        return answer

    def _line(self, op: str) -> bytes:
        while b"\n" not in self._buffer:
            if not self._selector.select(self._timeout):
                self.close()
                raise self._failure(op, f"gave no answer in {self._timeout:.0f} s")
            piece = os.read(self._out.fileno(), 1 << 16)
            if not piece:
                raise self._failure(op, "has ended")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _failure(self, op: str, what: str) -> BenchmarkError:
        lines = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        tail = "; ".join(line.strip() for line in lines[-3:])
        return BenchmarkError(f"The peer {what} at {op!r}. Its last lines: {tail}")

    def close(self) -> None:
        """End the process."""
        self._selector.close()
        for pipe in (self._in, self._out):
            with suppress(OSError):  # what a dead peer was not told is lost
                pipe.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def _in(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def _out(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout
