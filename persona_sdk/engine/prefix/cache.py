"""The host tier of prefixes: keys and values in RAM, found again by composition and tokens.

    lookup(plan, tokens) ── hashes of the block boundaries, longest first ──► entry ── compare tokens ──► Hit
                         └─ none, or a longer one may be on disk ──► spill.load(hashes) ── compare ──► Hit

An entry holds whole blocks of one prompt and is found at each of their boundaries, so prompts that part
ways share what is before. An entry that begins with all of another one takes its place. The least recently
used entries leave when the budget is full.

Two requests share an entry only if base, patches, gates, soft prefix and tokens are all equal. The labels
they were made for (`scopes`) are no part of that; they say what `forget` takes away. Forgetting overwrites
the numbers, as soon as no row reads them any more.
"""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, TypeAlias, runtime_checkable

from persona_sdk.engine.prefix.bundles import KVShape, erase, first, in_host, shape_of
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
    key: Digest
    tokens: tuple[int, ...]
    lead: int
    bundle: TensorBundle
    scopes: frozenset[str]
    hashes: tuple[Digest, ...]  # of all boundaries, the root first
    bytes: int
    readers: int = 0
    forgotten: bool = False


@dataclass(eq=False, kw_only=True)
class Hit:
    """A kept beginning of a prompt. Use it as a context manager: its numbers stay until the block ends.

    ``bundle`` holds ``length`` positions, the soft prefix and then the prompt's first ``tokens`` tokens.
    """

    tokens: int
    length: int
    bundle: TensorBundle
    release: Callable[[], Any] = field(default=lambda: None, repr=False)

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
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._at: dict[Digest, dict[int, None]] = {}  # boundary -> ids of the entries that have it
        self._counts = dict.fromkeys(
            ("lookups", "hits", "loaded", "reused_tokens", "evicted", "forgotten"), 0
        )
        self._bytes = 0
        self._next_id = 0
        self._lock = threading.RLock()  # a hit may be collected, and so released, inside any method

    def keepable(self, tokens: int) -> int:
        """How many of a prompt's first tokens an entry can hold: whole blocks."""
        return tokens // self.block * self.block

    def lookup(
        self, plan: CompositionPlan, tokens: Sequence[int], scopes: Collection[str] = ()
    ) -> Hit | None:
        """The longest kept beginning of a prompt that leaves at least one token to compute."""
        key, lead, prompt = composition_key(plan), lead_length(plan), tuple(tokens)
        hashes = [root(key, self.block), *chain(key, prompt[:-1], self.block)]
        if not lead:
            hashes[:1] = [""]  # nothing stands at the root; no entry is filed under this
        with self._lock:
            mark = self._counts["forgotten"]
            self._counts["lookups"] += 1
            hit = self._find(key, prompt, lead, hashes)
        shortest = int(not lead) if hit is None else hit.tokens // self.block + 1
        if self.spill is not None and shortest < len(hashes):
            loaded = self._load(plan, prompt, lead, hashes[shortest:], scopes, mark)
            if loaded is not None:
                if hit is not None:
                    hit.release()
                hit = loaded
        if hit is not None:
            with self._lock:
                self._counts["hits"] += 1
                self._counts["reused_tokens"] += hit.tokens
        return hit

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
        mark: int | None = None,
    ) -> bool:
        """Keep the keys and values of a plan's soft prefix and of `tokens`; whether they are kept now.

        The bundle belongs to the cache afterwards. Tokens after the last whole block are dropped.

        Args:
            plan: under which all of them were computed.
            tokens: the tokens of the prompt, without the soft prefix.
            bundle: ``{"keys", "values"}``, soft prefix first.
            scopes: labels of whom they were computed for.
            mark: of `mark` when the request was admitted. If something was forgotten since, they are not
                kept: they may stem from it.

        Raises:
            InvalidInputError: the bundle does not hold that many tokens.
        """
        lead, given = lead_length(plan), tuple(tokens)
        shape = shape_of(bundle, lead + len(given))
        kept = given[: self.keepable(len(given))]
        if lead + len(kept) == 0 or (self._shape is not None and shape != self._shape):
            return False
        key = composition_key(plan)
        bundle = in_host(first(bundle, lead + len(kept)))
        hashes = (*([root(key, self.block)] if lead else []), *chain(key, kept, self.block))
        entry = _Entry(key, kept, lead, bundle, frozenset(scopes), hashes, size_bytes(bundle))
        with self._lock:
            if mark is not None and mark != self._counts["forgotten"]:
                erase(bundle)
                return False
            return entry.bytes <= self._budget and self._file(entry)

    def forget(self, scope: str) -> int:
        """Drop and overwrite every entry that was made for `scope`; how many there were."""
        with self._lock:
            self._counts["forgotten"] += 1  # also when nothing was kept: a row may be under way
            gone = [name for name, entry in self._entries.items() if scope in entry.scopes]
            for name in gone:
                self._erase(name)
            return len(gone)

    def clear(self) -> None:
        """Drop and overwrite every entry."""
        with self._lock:
            self._counts["forgotten"] += 1
            for name in list(self._entries):
                self._erase(name)

    def stats(self) -> PrefixStats:
        """How full the cache is and what it did."""
        with self._lock:
            return PrefixStats(
                entries=len(self._entries), bytes=self._bytes, budget_bytes=self._budget, **self._counts
            )

    def _find(self, key: Digest, prompt: tuple[int, ...], lead: int, hashes: Sequence[Digest]) -> Hit | None:
        for place in range(len(hashes) - 1, -1, -1):
            length = place * self.block
            for name in self._at.get(hashes[place], ()):
                entry = self._entries[name]
                if entry.key == key and entry.lead == lead and entry.tokens[:length] == prompt[:length]:
                    self._entries.move_to_end(name)
                    return self._lend(entry, length)
        return None

    def _lend(self, entry: _Entry, tokens: int) -> Hit:
        length = entry.lead + tokens
        hit = Hit(tokens=tokens, length=length, bundle=first(entry.bundle, length))
        entry.readers += 1
        release = weakref.finalize(hit, self._returned, entry)  # also for a hit that nobody gives back
        release.atexit = False
        hit.release = release
        return hit

    def _returned(self, entry: _Entry) -> None:
        with self._lock:
            entry.readers -= 1
            if entry.forgotten and entry.readers == 0:
                erase(entry.bundle)

    def _load(
        self,
        plan: CompositionPlan,
        prompt: tuple[int, ...],
        lead: int,
        hashes: Sequence[Digest],
        scopes: Collection[str],
        mark: int,
    ) -> Hit | None:
        """Ask the spill, without the lock, for a longer prefix, and keep it if there is room."""
        found = None if self.spill is None else self.spill.load(list(reversed(hashes)), tuple(scopes))
        if found is None:
            return None
        tokens, bundle = found
        whole = self.keepable(len(tokens)) == len(tokens)
        if not whole or len(tokens) >= len(prompt) or tuple(tokens) != prompt[: len(tokens)]:
            return None
        length = lead + len(tokens)
        try:
            shape = shape_of(bundle, length)
        except InvalidInputError:
            return None
        if self._shape is not None and shape != self._shape:
            return None
        with self._lock:
            self._counts["loaded"] += 1
            self.insert(plan, tokens, bundle, scopes, mark=mark)
            if mark != self._counts["forgotten"]:
                return None  # what was read may have been forgotten while it was
            hit = self._find(composition_key(plan), prompt, lead, self._hashes(plan, tokens))
        if hit is not None and hit.tokens == len(tokens):
            return hit
        # An entry beyond the budget is not kept, but it can serve this one request.
        return Hit(tokens=len(tokens), length=length, bundle=first(bundle, length))

    def _hashes(self, plan: CompositionPlan, tokens: Sequence[int]) -> list[Digest]:
        key = composition_key(plan)
        return [root(key, self.block), *chain(key, tokens, self.block)]

    def _file(self, entry: _Entry) -> bool:
        """Put an entry in its place among the others; False if one of them holds all of it."""
        for name in list(self._at.get(entry.hashes[-1], ())):
            other = self._entries[name]
            if other.key == entry.key and other.tokens[: len(entry.tokens)] == entry.tokens:
                self._entries.move_to_end(name)
                return True
        for name in {name for mark in entry.hashes for name in self._at.get(mark, ())}:
            other = self._entries[name]
            if other.key == entry.key and entry.tokens[: len(other.tokens)] == other.tokens:
                entry.scopes |= other.scopes  # it may have been computed from the other one
                self._drop(name)
        name, self._next_id = self._next_id, self._next_id + 1
        self._entries[name] = entry
        self._bytes += entry.bytes
        for mark in entry.hashes:
            self._at.setdefault(mark, {})[name] = None
        while self._bytes > self._budget:
            self._drop(next(iter(self._entries)))
            self._counts["evicted"] += 1
        return True

    def _drop(self, name: int) -> _Entry:
        entry = self._entries.pop(name)
        self._bytes -= entry.bytes
        for mark in entry.hashes:
            self._at[mark].pop(name)
            if not self._at[mark]:
                del self._at[mark]
        return entry

    def _erase(self, name: int) -> None:
        entry = self._drop(name)
        entry.forgotten = True
        if entry.readers == 0:
            erase(entry.bundle)
