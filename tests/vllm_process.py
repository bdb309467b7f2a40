"""Runs inside vLLM's own environment: greedy tokens of exported personas, as JSON. No test by itself.

    python vllm_process.py MODEL STORE JOBS.json OUT.json

Jobs: ``{"prompts": [[token ids]], "new": n, "folders": {name: folder}, "names": [name], "refused": [name]}``.
Every folder is served through a plain ``LoRARequest``; every name through the resolver that vLLM's plugin
loader registered, all of them in one batch. The base has a batch of its own: on CPUs vLLM 0.32 gives a row
without a LoRA, in a step with rows that have one, whatever its last slot holds (index -1).
"""

import asyncio
import json
import os
import sys
from pathlib import Path

os.environ.update(
    {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_PLUGINS": "persona_sdk",
        "HF_HUB_OFFLINE": "1",
    }
)


def main(model: str, store: str, jobs_file: str, out: str) -> None:
    os.environ["PERSONA_STORE"] = store
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    jobs = json.loads(Path(jobs_file).read_text())
    engine = LLM(
        model=model,
        dtype="float32",
        enforce_eager=True,
        enable_lora=True,
        max_loras=4,
        max_cpu_loras=8,
        max_lora_rank=32,
        max_model_len=256,
        max_num_seqs=16,
        disable_log_stats=True,
    )
    resolver = LoRAResolverRegistry.get_resolver("persona_sdk")
    options = SamplingParams(temperature=0, max_tokens=jobs["new"], ignore_eos=True, detokenize=False)

    def tokens(requests: list[LoRARequest | None]) -> list[list[list[int]]]:
        """Rows of all requests in one call, so that steps hold several LoRAs at once."""
        prompts = [{"prompt_token_ids": prompt} for _ in requests for prompt in jobs["prompts"]]
        loras = [request for request in requests for _ in jobs["prompts"]]
        done = [
            list(row.outputs[0].token_ids) for row in engine.generate(prompts, options, lora_request=loras)
        ]
        size = len(jobs["prompts"])
        return [done[start : start + size] for start in range(0, len(done), size)]

    def resolve(name: str) -> LoRARequest | None:
        return asyncio.run(resolver.resolve_lora(model, name))

    direct = [LoRARequest(name, 1000 + i, folder) for i, (name, folder) in enumerate(jobs["folders"].items())]
    resolved = {name: resolve(name) for name in jobs["names"]}
    result = {
        "is_a_resolver": isinstance(resolver, LoRAResolver),
        "base": tokens([None])[0],
        "direct": dict(zip(jobs["folders"], tokens(direct), strict=True)),
        "resolved": dict(zip(resolved, tokens(list(resolved.values())), strict=True)),
        "requests": {
            name: [request.lora_name, request.lora_int_id, request.lora_path]
            for name, request in resolved.items()
        },
        "refused": {name: resolve(name) is None for name in jobs["refused"]},
    }
    Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
