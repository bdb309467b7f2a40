"""What personas remember: versioned MemCubes in one store, found again by search, erased for good.

    cube        the unit of memory: header and payload
    store       the one way in, and all reads, scoped to one owner
    lifecycle   states of life and their moves; transitions, expiry and uses are its verbs
    snapshots   names for revisions, and a persona as it was
    events      the audit log; audit checks it
    governance  who may do what; bound is the store as one principal sees it
    index       nearest neighbours, exact, in memory
    retrieval   passages for a query over several owners, hybrid
    routing     several sources: personas, groups, corpora, callables

Truth is SQLite plus content-addressed safetensors; everything else is derived. This package knows neither
adapters nor models: payloads are opaque tensors, and texts are data that nothing here interprets.
"""

if __name__ != "persona_sdk.memory":
    raise ImportError(
        "Import this package as persona_sdk.memory; 'memory' would be a second copy of every class."
    )

from persona_sdk.memory.bound import BoundStore
from persona_sdk.memory.cube import CubeDraft, CubeHeader, MemCube, Origin, Source, TextEncoder
from persona_sdk.memory.events import Event
from persona_sdk.memory.governance import Principal
from persona_sdk.memory.index import VectorIndex
from persona_sdk.memory.passage import Passage, Why
from persona_sdk.memory.receipt import Receipt
from persona_sdk.memory.retrieval import CrossEncoder, Retriever
from persona_sdk.memory.revisions import PersonaRecord, Revision
from persona_sdk.memory.scoring import RetrievalOptions
from persona_sdk.memory.snapshots import MemoryView, Snapshot
from persona_sdk.memory.store import MemoryStore

__all__ = [
    "BoundStore",
    "CrossEncoder",
    "CubeDraft",
    "CubeHeader",
    "Event",
    "MemCube",
    "MemoryStore",
    "MemoryView",
    "Origin",
    "Passage",
    "PersonaRecord",
    "Principal",
    "Receipt",
    "RetrievalOptions",
    "Retriever",
    "Revision",
    "Snapshot",
    "Source",
    "TextEncoder",
    "VectorIndex",
    "Why",
]
