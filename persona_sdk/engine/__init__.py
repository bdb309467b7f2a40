"""Executes composition plans over token ids. Knows no users, no text and no store.

rows.py      row-bound low-rank buffers and their branch, y += B (gate * (A x))
hooks.py     attaches the branch to the linears of any transformers causal LM, once
prompts.py   left-padded layout of prompts with soft prefixes in front
sampling.py  per-row choice of the next token
engine.py    the loop
"""

from persona_sdk.engine.engine import Completion, Engine, Request, Step

__all__ = ["Completion", "Engine", "Request", "Step"]
