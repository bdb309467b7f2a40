"""What a query is worth to every row of one owner's slice. Pure: no store, no clock, no encoder.

    score = (dense + lexical + neighbours + dated) * decay * trust     see `fusion`
    dated = date weight * span of the cosines * (near(i) - mean near)
    near  = 0.5 ** (days beside what is asked about / half width)

A row is out of the question while it has expired, or where its statement does not hold: at ``at``, else at
some moment of the span that the query speaks of, else now.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32
from pydantic import AwareDatetime, Field

from persona_sdk.config import FrozenConfig
from persona_sdk.memory import fusion, ranking
from persona_sdk.memory.calendar_spans import Interval
from persona_sdk.memory.cube import TRUST_ORDER
from persona_sdk.memory.governance import OWNER, Standing
from persona_sdk.memory.index import dense_scores
from persona_sdk.memory.passage import Why
from persona_sdk.memory.slices import Slice

_DAY = 86400.0


class RetrievalOptions(FrozenConfig):
    """Weights of recall. `benchmarks.memory_recall` says on what the defaults were chosen."""

    lexical_weight: float = Field(1.0, ge=0, description="of the words, beside 1 for the cosine")
    context_weight: float = Field(0.75, ge=0, le=1, description="of the neighbours' words in a turn's own")
    neighbour_weight: float = Field(0.3, ge=0, le=1, description="of the neighbours' scores")
    least_span: float = Field(0.3, gt=0, description="of the cosines of a slice, for the units of the rest")
    date_weight: float = Field(0.2, ge=0, description="of lying in the span that the query speaks of")
    date_half_width: float = Field(7.0, gt=0, description="days beside that span at which half is left")
    half_lives: tuple[tuple[str, float], ...] = Field(
        (("event", 30.0), ("preference", 180.0)), description="days by semantic type; others do not age"
    )
    decay_floor: float = Field(0.3, ge=0, le=1)
    trust_weights: tuple[tuple[str, float], ...] = (
        ("assistant", 0.95),
        ("tool", 0.9),
        ("import", 0.9),
        ("web", 0.8),
    )
    mmr_trade_off: float = Field(1.0, ge=0, le=1, description="1: by score alone")
    candidates: int = Field(50, ge=1, description="that MMR and the cross-encoder see")
    rerank: bool = Field(True, description="use the cross-encoder, if the retriever has one")
    parse_dates: bool = True
    at: AwareDatetime | None = Field(None, description="what was so then; None: what is so now")
    history: bool = Field(False, description="also what was retired, archived or is no longer so")


@dataclass(frozen=True)
class Query:
    """What is asked: its vector, its stems, the span of time it speaks of, and the present."""

    text: str
    vector: Float32[np.ndarray, " d"]
    words: Sequence[str]
    span: Interval | None
    now: datetime
    options: RetrievalOptions


@dataclass(frozen=True, eq=False)
class Ranked:
    """The best rows of one owner's slice, with the parts of their scores."""

    owner: str
    ids: tuple[str, ...]
    scores: Float[np.ndarray, " k"]
    vectors: Float32[np.ndarray, "k d"]
    why: tuple[Why, ...]


def rank(found: Slice, asked: Query, k: int, standing: Standing = OWNER) -> Ranked:
    """The `k` best rows of a slice, among those that whoever asks may read."""
    options = asked.options
    if not found.ids:
        return Ranked(found.owner, (), np.zeros(0), np.zeros((0, 0), np.float32), ())
    visible = _both(_visible(found, asked), _readable(found, standing))
    dense = dense_scores(found, asked.vector)
    bm25, coverage = found.postings(options.context_weight).search(asked.words)
    if visible is not None:
        bm25, coverage = bm25 * visible, coverage * visible
    parts = fusion.fuse(
        dense,
        fusion.gated(bm25, coverage),
        visible,
        found.before,
        found.after,
        lexical_weight=options.lexical_weight,
        neighbour_weight=options.neighbour_weight,
        least_span=options.least_span,
    )
    columns = {"lexical": parts.lexical, "neighbours": parts.neighbours, "coverage": coverage}
    scores = parts.total
    if (near := _near(found, asked)) is not None:
        columns["dated"] = near * np.float32(parts.span)
        scores = scores + columns["dated"]
    for name, factor in (("decay", _decay(found, asked)), ("trust", _trust(found, options))):
        if factor is not None:
            columns[name], scores = factor, ranking.weigh(scores, factor)
    shown = scores if visible is None else np.where(visible, scores, -np.inf)
    rows = ranking.best(shown, k)
    given = {name: column[rows].tolist() for name, column in {"dense": dense, **columns}.items()}
    why = tuple(Why(**dict(zip(given, values, strict=True))) for values in zip(*given.values(), strict=True))
    return Ranked(
        found.owner, tuple(found.ids[row] for row in rows.tolist()), scores[rows], found.vectors[rows], why
    )


def _readable(found: Slice, standing: Standing) -> Bool[np.ndarray, " n"] | None:
    """The rows of live cubes that `standing` may read; None: all. As `Standing.may`, for a whole slice."""
    if standing.everything:
        return None
    none = np.zeros(len(found.ids), np.bool_)
    readable: Bool[np.ndarray, " n"] = ~found.special if standing.member else none
    granted = {cube_id for cube_id, _ in standing.granted}
    if granted:
        readable |= np.fromiter((name in granted for name in found.ids), np.bool_, len(found.ids))
    return readable


def _both(
    one: Bool[np.ndarray, " n"] | None, other: Bool[np.ndarray, " n"] | None
) -> Bool[np.ndarray, " n"] | None:
    if one is None or other is None:
        return other if one is None else one
    both: Bool[np.ndarray, " n"] = one & other
    return both


def _visible(found: Slice, asked: Query) -> Bool[np.ndarray, " n"] | None:
    """Rows that have not expired and whose statement holds at the time that is asked about; None: all."""
    if found.timeless:
        return None
    options, now = asked.options, asked.now.timestamp()
    living: Bool[np.ndarray, " n"] = found.expires > now
    if options.at is None and asked.span is not None:
        begin, end = _seconds(asked.span)
        return living & (found.valid_from < end) & (found.valid_to > begin)
    if options.at is None and options.history:
        return living
    moment = now if options.at is None else options.at.timestamp()
    return living & (found.valid_from <= moment) & (found.valid_to > moment)


def _seconds(span: Interval) -> tuple[float, float]:
    return (
        -math.inf if span.start is None else span.start.timestamp(),
        math.inf if span.end is None else span.end.timestamp(),
    )


def _near(found: Slice, asked: Query) -> Float32[np.ndarray, " n"] | None:
    """How near each memory is to the span that is asked about, from the mean: all alike get nothing."""
    if asked.span is None or not asked.options.date_weight:
        return None
    begin, end = _seconds(asked.span)
    moments = np.where(np.isfinite(found.valid_from), found.valid_from, found.created)
    days = np.maximum(np.maximum(begin - moments, moments - end), 0.0) / _DAY
    near = np.exp2(-days / asked.options.date_half_width)
    centred: np.ndarray[Any, Any] = (near - near.mean()) * asked.options.date_weight
    return centred.astype(np.float32)


def _decay(found: Slice, asked: Query) -> Float[np.ndarray, " n"] | None:
    """Weights by age; None where nothing ages."""
    by_type = dict(asked.options.half_lives)
    if not found.own_half_lives and not by_type.keys() & set(found.type_names):
        return None
    lives = np.asarray([by_type.get(name, math.inf) for name in found.type_names])[found.types]
    lives = np.where(np.isnan(found.half_life), lives, found.half_life)
    ages = (asked.now.timestamp() - found.created) / _DAY
    return ranking.decay(ages, lives, floor=asked.options.decay_floor)


def _trust(found: Slice, options: RetrievalOptions) -> Float[np.ndarray, " n"] | None:
    """Weights by trust; None where all have the same full one."""
    by_name = dict(options.trust_weights)
    weights = np.asarray([by_name.get(name, 1.0) for name in TRUST_ORDER])
    if all(weights[tier] == 1.0 for tier in found.tiers):
        return None
    chosen: np.ndarray[Any, Any] = weights[found.trust]
    return chosen
