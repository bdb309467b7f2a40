"""Executes composition plans over token ids. Knows no users, no text and no store.

request.py     what goes in and comes out
engine.py      every way to ask: submit, generate, stream, logits; one worker
generation.py  the handle of one request: iterate, await, cancel, steer
loop.py        one step of all rows: admit, prefill a chunk, decode, sample, emit
schedule.py    who is next, and whose prompt is computed (pure)
row.py         one running row
sampling.py    per-row choice of the next token
forward/       the forward pass over packed tokens, keys and values
low_rank/      adapters in slots, and their branch y += B (gate * (A x))
prefix/        keys and values of prompt prefixes, kept and reused
"""

from typing import Any


def __getattr__(name: str) -> Any:
    from importlib import import_module

    where = {"Engine": "engine", "Generation": "generation", "EngineOptions": "options"}.get(name, "request")
    return getattr(import_module(f"persona_sdk.engine.{where}"), name)
