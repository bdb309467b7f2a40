"""Measurements of what this SDK claims, each against its peers on the same rows, each with its floor.

timing.py      interleaved timing, the rule that drops disturbed iterations, bootstrap intervals
harness.py     the JSON every run writes, machine description, resumable cells, command line
floor.py       what the hardware allows: bytes and operations from shapes
contenders.py  base, ours and peft on one set of weights, and the check that they agree
subjects.py    the base models it is measured on
compose.py     many adapters in one batch: cost over the base model, and against peft; with
               compose_cell.py (one point of the grid) and compose_tables.py (from points to bars)
plots.py       one figure per benchmark
report.py      docs/results.md from benchmarks/results/*.json
"""
