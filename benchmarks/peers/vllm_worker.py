"""The vLLM side of `benchmarks.peers.vllm_rows`: a program for vLLM's own environment, idle unless asked.

It imports nothing of this repository. Commands come as JSON lines on standard input; one JSON line
answers each. vLLM logs to standard output, so the answers go to a private copy of it and everything else
is sent to standard error.

    {"op": "open", "model": DIR, "dtype": "float32", "rows": 32, "rank": 16, "compile": false, ...}
    {"op": "start", "prompts": [[ids]], "adapters": [DIR or null], "tokens": n}
    {"op": "step"}        one scheduler step: a prefill of all waiting rows, or one token of each
    {"op": "stop"}        drop all rows
"""

import json
import os
import sys
import time
from typing import Any


class Worker:
    """One vLLM engine and its current rows."""

    def __init__(self) -> None:
        self.engine: Any = None
        self.loras: dict[str, Any] = {}
        self.batch = 0
        self.names: list[str] = []

    def open(
        self,
        *,
        model: str,
        dtype: str,
        rows: int,
        rank: int,
        length: int,
        prefill_tokens: int,
        compile: bool,
    ) -> dict[str, Any]:
        """Build the engine; `rank` 0 builds it without LoRA, as its operator would."""
        import torch
        import vllm

        lora = {"enable_lora": True, "max_loras": rows, "max_cpu_loras": rows, "max_lora_rank": rank}
        self.engine = vllm.LLM(
            model=model,
            dtype=dtype,
            enforce_eager=not compile,
            max_model_len=length,
            max_num_seqs=rows,
            max_num_batched_tokens=max(prefill_tokens, length),
            enable_prefix_caching=False,
            disable_log_stats=True,
            **(lora if rank else {}),
        ).llm_engine
        return {"version": vllm.__version__, "threads": torch.get_num_threads()}

    def start(self, *, prompts: list[list[int]], adapters: list[str | None], tokens: int) -> dict[str, Any]:
        """Queue rows that generate exactly `tokens` tokens, greedily."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        self.batch += 1
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        for row, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True)):
            lora = None
            if adapter is not None:
                if adapter not in self.loras:
                    self.loras[adapter] = LoRARequest(f"a{len(self.loras)}", len(self.loras) + 1, adapter)
                lora = self.loras[adapter]
            name = f"{self.batch}.{row}"
            self.names.append(name)
            self.engine.add_request(name, {"prompt_token_ids": prompt}, sampling, lora_request=lora)
        return {}

    def step(self) -> dict[str, Any]:
        """One step; the new token of every row, and what it took."""
        wall, cpu = time.perf_counter(), time.thread_time()
        outputs = self.engine.step()
        seconds = {"wall": time.perf_counter() - wall, "cpu": time.thread_time() - cpu}
        tokens = {int(o.request_id.split(".")[1].split("-")[0]): o.outputs[0].token_ids[-1] for o in outputs}
        return {**seconds, "tokens": [tokens[row] for row in sorted(tokens)]}

    def stop(self) -> dict[str, Any]:
        """Drop all rows, so that the next batch starts from nothing."""
        self.engine.abort_request(self.names)
        self.names = []
        if self.engine.has_unfinished_requests():
            raise RuntimeError("vLLM did not let go of aborted requests")
        return {}


def main() -> None:
    """Answer commands until standard input ends."""
    del sys.path[0]  # this file's folder: its modules are none of vLLM's business
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(worker, command.pop("op"))(**command)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
