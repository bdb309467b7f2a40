"""Request traces as S-LoRA and Punica draw them: when a request comes, for whom, and how long it is.

    gaps        Gamma(shape 1/cv², scale cv²/rate): mean 1/rate, coefficient of variation cv; cv 1 is Poisson
    uniform     P(i) = 1/n                          S-LoRA's tables (its power law at α = 1)
    power       i = floor(n U^α), so P(i < k) = (k/n)^(1/α)
    zipf        P(i) proportional to (i+1)^-s       Punica's "skewed" at s = 1.5
    lengths     uniform on whole numbers, both ends included

Adapters are numbered by popularity, the most popular first. A trace is a pure function of its settings.
Arrivals, adapters and lengths have streams of their own, so traces that differ in the number of adapters
alone have the same arrivals and lengths, and can be compared request by request.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from persona_sdk.config import FrozenConfig

Law = Literal["uniform", "power", "zipf"]


class TraceConfig(FrozenConfig):
    """What a trace is drawn from."""

    requests: int = Field(ge=1)
    adapters: int = Field(ge=1)
    rate: float = Field(gt=0, description="requests a second")
    cv: float = Field(1.0, gt=0, description="coefficient of variation of the gaps")
    law: Law = "uniform"
    exponent: float = Field(1.5, gt=0, description="s of zipf, α of power; unused by uniform")
    prompt: tuple[int, int] = (4, 32)
    output: tuple[int, int] = (4, 32)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _lengths_are_ranges(self) -> "TraceConfig":
        for low, high in (self.prompt, self.output):
            if not 1 <= low <= high:
                raise ValueError(f"lengths from {low} to {high}")
        return self


@dataclass(frozen=True)
class Arrival:
    """One request: seconds after the start, whose adapter, tokens in and out."""

    time: float
    adapter: int
    prompt: int
    output: int


def trace(config: TraceConfig) -> list[Arrival]:
    """All requests in order of arrival."""
    gaps, adapters, prompts, outputs = (np.random.default_rng([config.seed, stream]) for stream in range(4))
    count = config.requests
    columns = zip(
        np.cumsum(gaps_between(gaps, count, rate=config.rate, cv=config.cv)),
        popularity(adapters, count, config.adapters, law=config.law, exponent=config.exponent),
        prompts.integers(*config.prompt, size=count, endpoint=True),
        outputs.integers(*config.output, size=count, endpoint=True),
        strict=True,
    )
    return [Arrival(float(time), int(who), int(into), int(out)) for time, who, into, out in columns]


def gaps_between(draw: np.random.Generator, count: int, *, rate: float, cv: float) -> NDArray[np.float64]:
    """Seconds from one arrival to the next."""
    return draw.gamma(1 / cv**2, cv**2 / rate, count)


def popularity(
    draw: np.random.Generator, count: int, adapters: int, *, law: Law, exponent: float
) -> NDArray[np.int64]:
    """The adapter of each request.

    One uniform number is drawn for each and put through the law's inverse distribution function.
    """
    uniform = draw.random(count)
    if law == "uniform":
        chosen = uniform * adapters
    elif law == "power":
        chosen = uniform**exponent * adapters
    else:
        weights = np.arange(1, adapters + 1, dtype=float) ** -exponent
        chosen = np.searchsorted(np.cumsum(weights) / weights.sum(), uniform, side="right").astype(float)
    return np.minimum(chosen, adapters - 1).astype(np.int64)


def distinct(requests: list[Arrival], rows: int) -> float:
    """Mean number of distinct adapters among `rows` requests that came one after another."""
    windows = range(max(len(requests) - rows, 0) + 1)
    return float(np.mean([len({one.adapter for one in requests[i : i + rows]}) for i in windows]))
