"""Batches of the peers, and ours, run one step at a time so that they can take turns.

rows.py          what a step-by-step batch is; a stand-in for tests
eager.py         transformers: the plain module, peft's mixed batch, peft switching between adapters
continuous.py    transformers' continuous batching, timed by its own timestamps
worker.py        an idle subprocess driven over pipes
vllm_rows.py     vLLM in an environment of its own, by such a worker
vllm_worker.py   the program that runs there
"""
