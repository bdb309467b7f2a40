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

from persona_sdk.engine.engine import Engine
from persona_sdk.engine.generation import Generation
from persona_sdk.engine.options import EngineOptions
from persona_sdk.engine.request import Completion, Request, Steer, Step

__all__ = ["Completion", "Engine", "EngineOptions", "Generation", "Request", "Steer", "Step"]
