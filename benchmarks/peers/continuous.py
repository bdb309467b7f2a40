"""transformers' continuous batching, without adapters: it has no field for them.

Its loop runs in a thread of its own and cannot be stepped, so one turn is one generation and a step is the
gap between the timestamps that it records itself. Sizes are given: what it would infer is meant for GPUs.
Blocks are not shared, because its prefix hash knows tokens only, and adapters would leak through it.
"""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from benchmarks.harness import BenchmarkError

_PAGE = 256


@dataclass(frozen=True)
class Turn:
    """Seconds until the last row had its first token, and of every step after it."""

    prefill: float
    steps: list[float]


class ContinuousBatching:
    """Generations of a fixed batch."""

    def __init__(self, module: nn.Module, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        self._module: Any = module
        self._prompts, self._tokens = [list(prompt) for prompt in prompts], tokens

    def turn(self) -> Turn:
        """One generation, start and end of its loop outside the clock.

        Raises:
            BenchmarkError: a row failed or ended early.
        """
        from transformers import ContinuousBatchingConfig, GenerationConfig

        width = max(map(len, self._prompts)) + self._tokens
        sizes = ContinuousBatchingConfig(
            page_size=_PAGE,
            num_blocks=len(self._prompts) * (width // _PAGE + 1) + 1,
            max_batch_tokens=sum(map(len, self._prompts)),
            max_requests_per_batch=len(self._prompts),
            allow_block_sharing=False,
            use_cuda_graph=False,
            use_async_batching=False,
        )
        options = GenerationConfig(max_new_tokens=self._tokens, do_sample=False, eos_token_id=-1)
        log = logging.getLogger("transformers.generation.continuous_batching")
        level = log.level
        log.setLevel(logging.ERROR)
        outputs = []
        try:
            with self._module.continuous_batching_context_manager(
                generation_config=copy.deepcopy(options), continuous_batching_config=sizes
            ) as manager:
                manager.add_requests(self._prompts, max_new_tokens=self._tokens, record_timestamps=True)
                for output in manager:
                    outputs.append(output)
                    if len(outputs) == len(self._prompts):
                        break
        finally:
            log.setLevel(level)
        return turn_of(
            [output.created_time for output in outputs],
            [output.timestamps for output in outputs],
            self._tokens,
        )


def turn_of(created: Sequence[float], stamps: Sequence[Sequence[float]], tokens: int) -> Turn:
    """A turn from what each row recorded. Steps in which rows were still being prefilled do not count.

    Raises:
        BenchmarkError: a row has too few timestamps.
    """
    if not stamps or any(len(row) != tokens for row in stamps):
        raise BenchmarkError(
            f"Continuous batching gave {sorted({len(row) for row in stamps})} of {tokens} tokens."
        )
    begun = max(row[0] for row in stamps)
    slowest = max(stamps, key=lambda row: row[0])
    return Turn(begun - min(created), np.diff(np.asarray(slowest)).tolist())
