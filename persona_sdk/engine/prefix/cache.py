"""The host tier of prefixes: keys and values in RAM, found again by composition and tokens.

    lookup(plan, tokens) ── hashes of the block boundaries, longest first ──► entry ── compare tokens ──► Hit
                         └─ none, or a longer one may be on disk ──► spill.load(hashes) ── compare ──► Hit

    entries of one composition form a tree:    system + pinned memories ─┬─ first question
                                                                         └─ second question

An entry holds whole blocks: those that no other entry held when it came. The rest it shares with its parent,
so what many prompts begin with is kept once. Using an entry uses its parents too; the least recently used
entries, which are thus leaves, leave when the budget is full.

Two requests share an entry only if base, patches, gates, soft prefix and tokens are all equal. The labels
they were made for (`scopes`) are no part of that; they say what `forget` takes away, together with all that
continues it. Whatever leaves is overwritten, as soon as no row reads it any more: what was evicted may be
forgotten later.
"""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, Self, TypeAlias, runtime_checkable

from persona_sdk.engine.prefix.bundles import KVShape, erase, in_host, joined, part, shape_of
from persona_sdk.engine.prefix.keys import BLOCK, chain, composition_key, lead_length, root
from persona_sdk.errors import InvalidInputError
from persona_sdk.plan import CompositionPlan
from persona_sdk.tensors import Digest, TensorBundle, size_bytes

_COUNTED = ("lookups", "hits", "loaded", "reused_tokens", "evicted", "forgotten")

Spilled: TypeAlias = tuple[tuple[int, ...], TensorBundle]


@runtime_checkable
class Spill(Protocol):
    """Where a miss is looked up next, a disk for example."""

    def load(self, hashes: Sequence[Digest], scopes: Sequence[str]) -> Spilled | None:
        """Tokens and keys and values that end at one of these boundaries, best first, or None.

        Only what belongs to one of `scopes` may be given. The cache compares the tokens itself.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class PrefixStats:
    """How full the cache is, and how it has done so far, in requests and in tokens of their prompts."""

    entries: int
    bytes: int
    budget_bytes: int
    lookups: int
    hits: int
    loaded: int
    reused_tokens: int
    evicted: int
    forgotten: int


@dataclass(eq=False)
class _Entry:
    """Positions `offset` and later of a prompt; the ones before are its parent's."""

    key: Digest
    tokens: tuple[int, ...]
    lead: int
    offset: int
    bundle: TensorBundle
    scopes: frozenset[str]
    hashes: tuple[Digest, ...]  # of its own boundaries
    parent: "_Entry | None"
    children: set["_Entry"] = field(default_factory=set)
    readers: int = 0
    dropped: bool = False

    @cached_property
    def bytes(self) -> int:
        return size_bytes(self.bundle)

    def line(self) -> Iterator["_Entry"]:
        """The entry, its parent, and so on."""
        entry: _Entry | None = self
        while entry is not None:
            yield entry
            entry = entry.parent

    def descendants(self) -> Iterator["_Entry"]:
        """The entry and all that continues it."""
        yield self
        for child in self.children:
            yield from child.descendants()


@dataclass(eq=False, kw_only=True)
class Hit:
    """A kept beginning of a prompt. Use it as a context manager: its numbers stay until the block ends.

    ``parts``, one after another, hold ``length`` positions: the soft prefix and then the prompt's first
    ``tokens`` tokens. ``bundle`` is all of them in one, copied if there are several.
    """

    tokens: int
    length: int
    parts: tuple[TensorBundle, ...]
    release: Callable[[], Any] = field(default=lambda: None, repr=False)

    @cached_property
    def bundle(self) -> TensorBundle:
        """Keys and values of all positions."""
        return joined(self.parts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class PrefixCache:
    """Kept prefixes of one engine; every method may be called from any thread.

    Args:
        budget_bytes: what all entries together may take. 0 keeps nothing.
        block: tokens between two places where a prompt can be continued.
        shape: what the engine's pool takes; bundles of another shape or precision are not kept.
        spill: asked when it may know a longer prefix than this tier does.
    """

    def __init__(
        self,
        budget_bytes: int,
        *,
        block: int = BLOCK,
        shape: KVShape | None = None,
        spill: Spill | None = None,
    ) -> None:
        if budget_bytes < 0 or block < 1:
            raise InvalidInputError(
                f"budget_bytes={budget_bytes}, block={block}.", hint="Expected at least 0 and 1."
            )
        self.block = block
        self.spill = spill
        self._shape = shape
        self._budget = budget_bytes
        self._entries: OrderedDict[_Entry, None] = OrderedDict()  # least recently used first
        self._at: dict[Digest, _Entry] = {}  # by boundary
        self._counts = dict.fromkeys(_COUNTED, 0)
        self._bytes = 0
        self._lock = threading.RLock()  # a hit may be collected, and so released, inside any method

    def keepable(self, tokens: int) -> int:
        """How many of a prompt's first tokens can be kept: whole blocks."""
        return tokens // self.block * self.block

    def wants(self, tokens: int, cached: int) -> bool:
        """Whether a prompt of that length, of which `cached` tokens came from here, holds a block to keep."""
        return self._budget > 0 and self.keepable(tokens) > cached

    def lookup(
        self,
        plan: CompositionPlan,
        tokens: Sequence[int],
        scopes: Collection[str] = (),
        *,
        spill: bool = True,
    ) -> Hit | None:
        """The longest kept beginning of a prompt that leaves at least one token to compute.

        Found is only what was computed for one of these `scopes`, or for nobody if there are none: else the
        time to the first token would tell one persona what another was told. The same holds of the spill,
        which is not asked without scopes or with ``spill=False``.
        """
        hit = self._search(plan, tuple(tokens), tuple(scopes), spill=spill)
        with self._lock:
            self._counts["lookups"] += 1
            if hit is not None:
                self._counts["hits"] += 1
                self._counts["reused_tokens"] += hit.tokens
        return hit

    def prefetch(self, plan: CompositionPlan, tokens: Sequence[int], scopes: Collection[str]) -> None:
        """Bring what the spill knows of a prompt into RAM, for a `lookup` that must not wait for a disk."""
        hit = self._search(plan, tuple(tokens), tuple(scopes))
        if hit is not None:
            hit.release()

    def mark(self) -> int:
        """Where forgetting stands now; see `insert`."""
        with self._lock:
            return self._counts["forgotten"]

    def insert(
        self,
        plan: CompositionPlan,
        tokens: Sequence[int],
        bundle: TensorBundle,
        scopes: Iterable[str] = (),
        *,
        start: int = 0,
        mark: int | None = None,
    ) -> bool:
        """Keep the keys and values of a plan's soft prefix and of `tokens`; whether they are kept now.

        The bundle belongs to the cache afterwards. Tokens after the last whole block are dropped.

        Args:
            plan: under which all of them were computed.
            tokens: the tokens of the prompt, without the soft prefix.
            bundle: ``{"keys", "values"}``, soft prefix first.
            scopes: labels of whom they were computed for.
            start: with a number above 0, the bundle begins at this token, and what is before it, soft prefix
                included, is that of a hit. If that is not kept any more, neither is this.
            mark: of `mark` before the prompt was made. If something was forgotten since, nothing is kept: it
                may stem from that.

        Raises:
            InvalidInputError: the bundle does not hold that many tokens.
        """
        lead, given = lead_length(plan), tuple(tokens)
        begins = lead + start if start else 0
        shape = shape_of(bundle, lead + len(given) - begins)
        kept = given[: self.keepable(len(given))]
        if lead + len(kept) == 0 or (self._shape is not None and shape != self._shape):
            return False
        key, hashes = composition_key(plan), self._hashes(plan, kept)
        with self._lock:
            if mark is not None and mark != self._counts["forgotten"]:
                return False
            parent, shared = self._find(key, kept, lead, hashes) or (None, 0)
            if parent is not None:
                self._touch(parent)
                for entry in parent.line():  # computed for these scopes as well
                    entry.scopes |= frozenset(scopes)
                if shared == len(kept):
                    return True
            if start and (parent is None or shared < start):
                return False
            offset = lead + shared if parent is not None else 0
            own = in_host(part(bundle, offset - begins, lead + len(kept) - begins))
            news = hashes[0 if parent is None and lead else shared // self.block + 1 :]
            return self._file(_Entry(key, kept, lead, offset, own, frozenset(scopes), tuple(news), parent))

    def serve(self, shape: KVShape | None, spill: Spill | None = None) -> None:
        """Say what the engine's pool takes, and who may know more. None as a shape: keep nothing."""
        with self._lock:
            self._shape, self.spill = shape, spill
            if shape is None:
                self._budget = 0

    def forget(self, scope: str) -> int:
        """Drop and overwrite what was made for `scope` and all that continues it; how many entries."""
        with self._lock:
            self._counts["forgotten"] += 1  # also when nothing was kept: a row may be under way
            made = [entry for entry in self._entries if scope in entry.scopes]
            gone = {entry for one in made for entry in one.descendants()}
            for entry in gone:
                self._drop(entry)
            return len(gone)

    def clear(self) -> None:
        """Drop and overwrite every entry."""
        with self._lock:
            self._counts["forgotten"] += 1
            for entry in list(self._entries):
                self._drop(entry)

    def stats(self) -> PrefixStats:
        """How full the cache is and what it did."""
        with self._lock:
            return PrefixStats(
                entries=len(self._entries), bytes=self._bytes, budget_bytes=self._budget, **self._counts
            )

    def _hashes(self, plan: CompositionPlan, tokens: Sequence[int]) -> list[Digest]:
        """Of the root, at which only a soft prefix stands, and of every boundary."""
        key = composition_key(plan)
        return [root(key, self.block), *chain(key, tokens, self.block)]

    def _search(
        self, plan: CompositionPlan, prompt: tuple[int, ...], scopes: tuple[str, ...], *, spill: bool = True
    ) -> Hit | None:
        key, lead, hashes = composition_key(plan), lead_length(plan), self._hashes(plan, prompt[:-1])
        with self._lock:
            mark = self._counts["forgotten"]
            hit = self._lend(self._find(key, prompt, lead, hashes, frozenset(scopes)))
        shortest = int(not lead) if hit is None else hit.tokens // self.block + 1
        if self.spill is None or not spill or not scopes or shortest >= len(hashes):
            return hit
        found = self.spill.load(list(reversed(hashes[shortest:])), scopes)
        loaded = None if found is None else self._take(plan, prompt, found, scopes, mark)
        if loaded is None:
            return hit
        if hit is not None:
            hit.release()
        return loaded

    def _take(
        self,
        plan: CompositionPlan,
        prompt: tuple[int, ...],
        found: Spilled,
        scopes: tuple[str, ...],
        mark: int,
    ) -> Hit | None:
        """Check what the spill gave, and keep it if there is room."""
        tokens, bundle = tuple(found[0]), found[1]
        whole = self.keepable(len(tokens)) == len(tokens)
        if not whole or len(tokens) >= len(prompt) or tokens != prompt[: len(tokens)]:
            return None
        lead = lead_length(plan)
        length = lead + len(tokens)
        try:
            shape = shape_of(bundle, length)
        except InvalidInputError:
            return None
        if self._shape is not None and shape != self._shape:
            return None
        with self._lock:
            if mark != self._counts["forgotten"]:
                return None  # what was read may have been forgotten while it was
            self._counts["loaded"] += 1
            if self.insert(plan, tokens, bundle, scopes):
                return self._lend(self._find(composition_key(plan), tokens, lead, self._hashes(plan, tokens)))
        # Beyond the budget it is not kept, but it can serve this one request.
        return Hit(tokens=len(tokens), length=length, parts=(part(bundle, 0, length),))

    def _find(
        self,
        key: Digest,
        prompt: tuple[int, ...],
        lead: int,
        hashes: Sequence[Digest],
        reader: frozenset[str] | None = None,
    ) -> tuple[_Entry, int] | None:
        """The entry with the last of these boundaries that is kept, and the tokens up to it.

        With a `reader`, only entries that were made for one of its scopes, or for nobody if it has none.
        """
        for place in range(len(hashes) - 1, -1 if lead else 0, -1):
            length = place * self.block
            entry = self._at.get(hashes[place])
            if (
                entry is not None
                and (entry.key, entry.lead) == (key, lead)
                and entry.tokens[:length] == prompt[:length]
                and (reader is None or entry.scopes & reader or not entry.scopes | reader)
            ):
                return entry, length
        return None

    def _lend(self, found: tuple[_Entry, int] | None) -> Hit | None:
        if found is None:
            return None
        entry, tokens = found
        self._touch(entry)
        length = stop = entry.lead + tokens
        used, parts = [], []
        for one in entry.line():
            if one.offset < stop:
                used.append(one)
                parts.append(part(one.bundle, 0, stop - one.offset))
                stop = one.offset
                one.readers += 1
        hit = Hit(tokens=tokens, length=length, parts=tuple(reversed(parts)))
        release = weakref.finalize(hit, self._returned, used)  # also for a hit that nobody gives back
        release.atexit = False
        hit.release = release
        return hit

    def _returned(self, used: Sequence[_Entry]) -> None:
        with self._lock:
            for entry in used:
                entry.readers -= 1
                if entry.dropped and entry.readers == 0:
                    erase(entry.bundle)

    def _touch(self, entry: _Entry) -> None:
        for one in entry.line():  # parents last: they are never older than what continues them
            self._entries.move_to_end(one)

    def _file(self, entry: _Entry) -> bool:
        """Put an entry into its tree; False if it is too large with all that is before it."""
        if sum(one.bytes for one in entry.line()) > self._budget:
            return False
        self._entries[entry] = None
        self._bytes += entry.bytes
        if entry.parent is not None:
            entry.parent.children.add(entry)
        for boundary in entry.hashes:
            self._at[boundary] = entry
        self._touch(entry)
        while self._bytes > self._budget:
            self._drop(next(iter(self._entries)))
            self._counts["evicted"] += 1
        return True

    def _drop(self, entry: _Entry) -> None:
        del self._entries[entry]
        self._bytes -= entry.bytes
        if entry.parent is not None:
            entry.parent.children.discard(entry)
        for boundary in entry.hashes:
            if self._at.get(boundary) is entry:
                del self._at[boundary]
        entry.dropped = True
        if entry.readers == 0:
            erase(entry.bundle)
