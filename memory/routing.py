"""Several sources for one question: own memory, groups, the application's texts, somebody else's search.

    step          local sources; external ones, best first, while what was found is judged not to be enough
    next step     with the question rewritten, where there is a rewriter; `max_steps` at most
    score         score of the source * trust prior of the source
    order         local first, then by the mean of Beta(a + helpful, b + asked - helpful), a / (a + b) = trust

Local sources are always asked, external ones only when the caller lists them and they are needed, each at
most once a step. One that fails is reported and changes nothing else. Whatever a source returns is data: its
text is checked and shortened, its trust is the one given to the source, and an id that is already taken stays
with the more trusted passage, so that a source cannot put its words into another one's mouth.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from pydantic import Field

from persona_sdk.config import FrozenConfig
from persona_sdk.errors import InvalidInputError
from persona_sdk.memory.cube import CubeHeader, Origin, Trust, clean_text
from persona_sdk.memory.passage import Passage

logger = logging.getLogger("persona_sdk.memory")

Found: TypeAlias = tuple[str, str, float]  # id, text, score in 0..1
Search: TypeAlias = Callable[[str, int], Sequence[Passage]]
ExternalSearch: TypeAlias = Callable[[str, int], Sequence[Found]]
Judge: TypeAlias = Callable[[str, Sequence[Passage]], bool]
Rewrite: TypeAlias = Callable[[str, Sequence[Passage]], str | None]


class RouterOptions(FrozenConfig):
    """Limits of a router."""

    max_steps: int = Field(3, ge=1, description="questions to the sources, the first one included")
    enough: float = Field(0.5, description="score of the best passage from which external help is not needed")
    prior_strength: float = Field(4.0, gt=0, description="asked times that the trust prior is worth")
    max_text: int = Field(4000, ge=1, description="characters of a passage from outside")


@dataclass(frozen=True)
class SearchSource:
    """One place to look, local or external, and how far what it says is believed before it was ever asked."""

    name: str
    search: Search
    trust: float = 1.0
    external: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.trust <= 1:
            raise InvalidInputError(
                f"The trust of {self.name!r} is {self.trust}.", hint="Expected 0 < trust <= 1."
            )


@dataclass(frozen=True)
class Record:
    """How often a source was asked, and how often that helped. The caller keeps it: reads do not learn."""

    asked: int = 0
    helpful: int = 0


@dataclass(frozen=True)
class Routed:
    """What was found, best first, which sources were asked how often, and which failed and how."""

    passages: tuple[Passage, ...]
    asked: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def external(
    name: str,
    search: ExternalSearch,
    *,
    trust: float = 0.5,
    tier: Trust = "web",
    max_text: int = RouterOptions().max_text,
) -> SearchSource:
    """A source over any callable ``(query, k) -> [(id, text, score), ...]`` that is not ours."""

    def passages(query: str, k: int) -> list[Passage]:
        return [_from_outside(name, tier, entry, max_text) for entry in list(search(query, k))[:k]]

    return SearchSource(name, passages, trust, external=True)


def _from_outside(name: str, tier: Trust, entry: Found, max_text: int) -> Passage:
    passage_id, text, score = entry
    given = float(score)
    if not math.isfinite(given) or not isinstance(text, str) or not isinstance(passage_id, str):
        raise InvalidInputError(f"{name!r} gave no usable passage.", hint="Expected (id, text, score).")
    header = CubeHeader(trust=tier, origin=Origin(kind="web", reference=passage_id[:256]))
    shown = clean_text(text, "text of a passage")[:max_text]
    readable = "".join(c for c in shown if c.isprintable() or c in "\n\t")
    return Passage(
        clean_text(passage_id, "id of a passage"),
        "",
        readable,
        min(max(given, 0.0), 1.0),
        header.created_at,
        header,
        name,
    )


def order(
    sources: Sequence[SearchSource], records: Mapping[str, Record], *, strength: float = 4.0
) -> list[SearchSource]:
    """Local sources first, then by what is to be expected of each; equal ones as they were given."""

    def expected(source: SearchSource) -> float:
        record = records.get(source.name, Record())
        return (source.trust * strength + record.helpful) / (strength + record.asked)

    return sorted(sources, key=lambda source: (source.external, -expected(source)))


class Router:
    """Asks sources in turn. It keeps nothing between calls."""

    def __init__(
        self,
        sources: Sequence[SearchSource],
        options: RouterOptions | None = None,
        *,
        judge: Judge | None = None,
        rewrite: Rewrite | None = None,
    ) -> None:
        """Take sources of different names.

        Args:
            sources: where to look.
            options: limits.
            judge: whether the passages suffice for the question; None compares the best score.
            rewrite: the next question to the sources, None for no more; None asks once.
        """
        self._sources = {source.name: source for source in sources}
        if len(self._sources) != len(sources):
            raise InvalidInputError("Two sources have one name.", hint="Passages are told apart by it.")
        self._options = options or RouterOptions()
        self._judge = judge or (lambda _, found: bool(found) and found[0].score >= self._options.enough)
        self._rewrite = rewrite

    def search(
        self,
        query: str,
        k: int = 5,
        *,
        sources: Sequence[str] | None = None,
        records: Mapping[str, Record] | None = None,
    ) -> Routed:
        """The `k` best passages of the sources named, each with the source and id it has there.

        Args:
            query: what to look for.
            k: how many at most.
            sources: names; an external source that is not among them is never called. None: all.
            records: what is known of the sources, for their order.

        Raises:
            InvalidInputError: a name is unknown, the query is empty or `k` is below 1.
        """
        if not query.strip() or k < 1:
            raise InvalidInputError(f"The query is empty or k is {k}.", hint="Give text and k of 1 or more.")
        names = list(self._sources) if sources is None else list(dict.fromkeys(sources))
        if unknown := set(names) - set(self._sources):
            raise InvalidInputError(
                f"No source {min(unknown)!r:.60}.", hint=f"Known sources: {', '.join(self._sources)}."
            )
        chosen = order(
            [self._sources[name] for name in names], records or {}, strength=self._options.prior_strength
        )
        routed, asking = Routed(()), query
        for _ in range(self._options.max_steps):
            for source in chosen:
                if not source.external or not self._judge(query, routed.passages):
                    routed = self._asked(source, asking, k, routed)
            following = None
            if self._rewrite is not None and not self._judge(query, routed.passages):
                following = self._rewrite(query, routed.passages)
            if not following or not following.strip() or following == asking:
                break
            asking = following
        return replace(routed, passages=routed.passages[:k])

    def _asked(self, source: SearchSource, query: str, k: int, so_far: Routed) -> Routed:
        asked = {**so_far.asked, source.name: so_far.asked.get(source.name, 0) + 1}
        try:
            found = [
                replace(passage, source=source.name, score=passage.score * source.trust)
                for passage in source.search(query, k)
            ]
        except Exception as error:
            if not source.external:
                raise
            logger.warning("the source %s failed: %s", source.name, type(error).__name__)
            return replace(so_far, asked=asked, failed={**so_far.failed, source.name: type(error).__name__})
        # The order of asking is that of trust, so the first passage of an id is the one to believe.
        first = {passage.id: passage for passage in (*reversed(found), *so_far.passages)}
        merged = sorted(first.values(), key=lambda passage: -passage.score)
        return replace(so_far, asked=asked, passages=tuple(merged))
