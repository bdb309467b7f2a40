"""Measurements of what this SDK claims, each against its peers on the same rows, each with its floor.

timing.py      interleaved timing, the rule that drops disturbed iterations, bootstrap intervals
harness.py     the JSON every run writes, machine description, resumable cells, command line
floor.py       what the hardware allows: bytes and operations from shapes
contenders.py  base, ours and peft on one set of weights, and the check that they agree
subjects.py    the base models it is measured on
compose.py     many adapters in one batch: cost over the base model, and against peft; with
               compose_cell.py (one point of the grid) and compose_tables.py (from points to bars)
traces.py      request traces: arrivals, popularity, lengths
peers/         peers run step by step, in this process or in one of their own
serve.py       serving many personas against base, peft and vLLM: steps (serve_step.py on the batch of
               serve_scene.py), traces (serve_replay.py), first tokens and stalls (serve_latency.py), and
               serve_tables.py (from what was measured to bars)
plots.py       one figure per benchmark
report.py      docs/results.md from benchmarks/results/*.json
"""
