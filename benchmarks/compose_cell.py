"""One point of the composition benchmark's grid: check that contenders agree, count operations, time them."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from benchmarks import floor
from benchmarks.contenders import (
    Base,
    Contender,
    Forward,
    Ours,
    Peft,
    check_equal,
    count_ops,
    random_factors,
    step_inputs,
)
from benchmarks.subjects import prompts
from benchmarks.timing import interleave
from persona_sdk.models import LanguageModel

_CHECKED = 4  # tokens a row in the equality check: they pass every module, and are cheap for 32 rows


@dataclass(frozen=True)
class Step:
    """One forward pass: `tokens` new tokens in each of `rows` rows after `cached` ones."""

    phase: Literal["decode", "prefill"]
    rows: int
    tokens: int
    cached: int = 0


@dataclass(frozen=True)
class Cell:
    """One point of the grid. `key` says everything its numbers depend on but the code."""

    model: str
    step: Step
    distinct: int
    rank: int
    seed: int
    iterations: int
    threads: int

    @property
    def key(self) -> str:
        """A file name."""
        step = self.step
        return (
            f"{self.model}-{step.phase}-{step.rows}x{step.tokens}-after{step.cached}-distinct{self.distinct}"
            f"-rank{self.rank}-seed{self.seed}-n{self.iterations}-threads{self.threads}"
        )


@dataclass(frozen=True)
class Stage:
    """One model and the contenders on it. `source` says where the weights came from."""

    model: LanguageModel
    source: str
    contenders: Mapping[str, Contender]
    rates: floor.Rates

    @classmethod
    def build(
        cls,
        model: LanguageModel,
        source: str,
        *,
        adapters: int,
        rank: int,
        seed: int,
        rates: floor.Rates,
    ) -> "Stage":
        """Base, ours and peft on one set of weights and `adapters` random adapters."""
        shapes = model.linear_shapes()
        factors = [random_factors(shapes, rank=rank, seed=1000 * seed + i) for i in range(adapters)]
        contenders: dict[str, Contender] = {
            "base": Base(model),
            # One kernel throughout: operations are counted, and must not depend on who shares the batch.
            "ours": Ours(model, factors, kernel="indexed"),
            "peft": Peft(model, factors),
        }
        return cls(model, source, contenders, rates)

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Everything the cell reports, as JSON-able data.

        Raises:
            BenchmarkError: the contenders do not agree; nothing was timed.
        """
        step, adapters = cell.step, [row % cell.distinct for row in range(cell.step.rows)]
        width = max(step.cached + step.tokens, _CHECKED)
        tokens = prompts(self.model, rows=step.rows, width=width, seed=cell.seed)
        vocab = int(self.model.module.config.vocab_size)
        data: dict[str, Any] = {
            "source": self.source,
            "shape": asdict(
                floor.Shape.of(self.model.linear_shapes(), vocab=vocab, d_model=self.model.d_model)
            ),
            "rates": asdict(self.rates),
            "equality": check_equal(self.contenders, adapters, tokens[:, :_CHECKED]),
        }
        with torch.inference_mode(), ExitStack() as stack:
            forwards = {
                name: stack.enter_context(contender.assigned(adapters))
                for name, contender in self.contenders.items()
            }
            caches = {name: self._cache(tokens, step) for name in forwards}
            inputs = step_inputs(tokens[:, step.cached : step.cached + step.tokens], step.cached)
            calls = {name: _call(forward, inputs, caches[name]) for name, forward in forwards.items()}

            def restore(name: str) -> None:
                if (cache := caches.get(name)) is not None:
                    cache.crop(-step.tokens)

            data["ops"] = {}
            for name, call in calls.items():
                call()  # the first step of a batch also arranges its rows
                restore(name)
                data["ops"][name] = count_ops(call)
                restore(name)
            data["timing"] = asdict(interleave(calls, iterations=cell.iterations, restore=restore))
            ours = self.contenders["ours"]
            if step.phase == "decode" and isinstance(ours, Ours):
                paired = {"base": calls["base"], "admission": ours.admission(adapters)}
                admission = interleave(paired, iterations=cell.iterations, warmups=1, restore=restore)
                data["admission"] = asdict(admission)
        return data

    def _cache(self, tokens: torch.Tensor, step: Step) -> Any:
        """What `step` continues from, the same for every contender: the first row's cache in all rows."""
        if not step.cached:
            return None
        cache = self.model.module(**step_inputs(tokens[:1, : step.cached])).past_key_values
        cache.batch_repeat_interleave(step.rows)
        return cache


def _call(forward: Forward, inputs: Mapping[str, Any], cache: Any) -> Callable[[], Any]:
    return lambda: forward(**inputs, past_key_values=cache)
