"""Base model, this SDK's engine and peft, resident in one process on one set of weights and factors.

Each contender has a module tree of its own (peft replaces linears, the engine hooks them), but the
parameter tensors behind the trees are the same objects. Before anything is timed all of them must agree.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import BenchmarkError
from persona_sdk.engine import Engine, EngineOptions, Request
from persona_sdk.models import LanguageModel
from persona_sdk.plan import CompositionPlan, LowRankPatch
from persona_sdk.tensors import Digest, TensorBundle, digest, low_rank_bundle, low_rank_pairs

TOLERANCE = 1e-4  # of the largest logit
NO_ADAPTER = -1

Forward = Callable[..., Any]


class Contender(Protocol):
    """Runs the model's forward pass with an adapter for each row."""

    def assigned(self, adapters: Sequence[int]) -> AbstractContextManager[Forward]:
        """A forward function in which row i has adapter ``adapters[i]``, or none for `NO_ADAPTER`."""
        ...


class Base:
    """The model without adapters, whatever is asked."""

    def __init__(self, model: LanguageModel) -> None:
        self._module = shared_copy(model.module)

    @contextmanager
    def assigned(self, adapters: Sequence[int]) -> Iterator[Forward]:
        """The plain module."""
        yield self._module


class Ours:
    """The engine's branch on the model's own modules: what the base runs, with hooks on its linears.

    The fused forward pass is left out, so that only the branch differs from the base; `benchmarks.serve`
    measures the engine as it is served.
    """

    def __init__(
        self, model: LanguageModel, factors: Sequence[TensorBundle], *, kernel: Any = "auto"
    ) -> None:
        copied = LanguageModel(model.name, shared_copy(model.module), model.tokenizer, model.fingerprint)
        self.engine = Engine(copied, EngineOptions(fused=False, max_rows=64, prefix_bytes=0, kernel=kernel))
        self._patches = [_patch(bundle) for bundle in factors]
        self._tensors = {patch.factors: bundle for patch, bundle in zip(self._patches, factors, strict=True)}

    @contextmanager
    def assigned(self, adapters: Sequence[int]) -> Iterator[Forward]:
        """The module with the rows' slots bound around every call, as in a generation."""
        with self.engine.bench(self._requests(adapters)) as steps:
            yield steps.bound(self.engine.model.module)

    def admission(self, adapters: Sequence[int]) -> Callable[[], object]:
        """What the engine does when a batch of rows is admitted whose adapters have their slots already."""
        requests = self._requests(adapters)

        def admit() -> None:
            with self.engine.reserved(requests):
                pass

        return admit

    def _requests(self, adapters: Sequence[int]) -> list[Request]:
        base = self.engine.model.fingerprint
        plans = [
            CompositionPlan(base, () if adapter == NO_ADAPTER else (self._patches[adapter],))
            for adapter in adapters
        ]
        return [Request(prompt=(0,), plan=plan, tensors=self._tensors) for plan in plans]


class Peft:
    """peft's mixed batches: ``adapter_names``, one name a row, factors filled with ours."""

    def __init__(self, model: LanguageModel, factors: Sequence[TensorBundle]) -> None:
        from peft import LoraConfig, get_peft_model

        self._module = shared_copy(model.module)
        rank = _patch(factors[0]).rank
        names = sorted({path.rpartition(".")[2] for path in model.linears()})
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names, lora_dropout=0.0)
        with warnings.catch_warnings():  # peft asks transformers a question that is being renamed
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
            # Weights on the meta device: ours are put in their place, so nothing is held twice.
            self._peft = get_peft_model(self._module, config, adapter_name="a0", low_cpu_mem_usage=True)
            for index in range(1, len(factors)):
                self._peft.add_adapter(f"a{index}", config, low_cpu_mem_usage=True)
        for index, bundle in enumerate(factors):
            for path, A, B in low_rank_pairs(bundle):
                layer: Any = self._module.get_submodule(path)
                layer.lora_A[f"a{index}"].weight = nn.Parameter(A, requires_grad=False)
                layer.lora_B[f"a{index}"].weight = nn.Parameter(B, requires_grad=False)
        self._peft.eval()

    @contextmanager
    def assigned(self, adapters: Sequence[int]) -> Iterator[Forward]:
        """The wrapped module. peft's per-call hooks are set once here, as its ``generate`` does."""
        names = ["__base__" if adapter == NO_ADAPTER else f"a{adapter}" for adapter in adapters]
        with self._peft._enable_peft_forward_hooks(adapter_names=names):
            yield self._module


def shared_copy(module: nn.Module) -> nn.Module:
    """A module tree of its own around the very same parameter and buffer tensors."""
    return copy.deepcopy(module, {id(t): t for t in (*module.parameters(), *module.buffers())})


def random_factors(
    shapes: Mapping[str, tuple[int, int]], *, rank: int, seed: int, scale: float = 0.02
) -> TensorBundle:
    """Random factors on every module, large enough to move the logits far beyond rounding."""
    draw = torch.Generator().manual_seed(seed)
    return low_rank_bundle(
        {
            path: (
                torch.randn(rank, d_in, generator=draw) / d_in**0.5,
                torch.randn(d_out, rank, generator=draw) * scale,
            )
            for path, (d_in, d_out) in shapes.items()
        }
    )


def _patch(factors: TensorBundle) -> LowRankPatch:
    mark: Digest = digest(factors)
    rank = next(low_rank_pairs(factors))[1].shape[0]
    return LowRankPatch(factors=mark, rank=rank, gate=(1.0,) * rank, origin=mark[:8])


def step_inputs(tokens: Int[Tensor, "rows width"], start: int = 0) -> dict[str, Any]:
    """Inputs for `tokens` that follow `start` cached ones, as the engine lays them out; no padding."""
    rows, width = tokens.shape
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones(rows, start + width, dtype=torch.long),
        "position_ids": torch.arange(start, start + width).expand(rows, -1),
        "use_cache": True,
        "logits_to_keep": 1,
    }


def two_steps(forward: Forward, tokens: Int[Tensor, "rows width"]) -> Float[Tensor, "steps rows vocab"]:
    """Logits of a prefill of all tokens but the last and of a decode step with the last."""
    width = tokens.shape[1] - 1
    first = forward(**step_inputs(tokens[:, :width]))
    second = forward(**step_inputs(tokens[:, width:], width), past_key_values=first.past_key_values)
    return torch.stack([first.logits[:, -1], second.logits[:, -1]])


def check_equal(
    contenders: Mapping[str, Contender], adapters: Sequence[int], tokens: Int[Tensor, "rows width"]
) -> dict[str, float]:
    """Largest logit differences relative to the largest logit, over a prefill and a decode step.

    Returns ``"adapters"`` (ours against peft), ``"none"`` (all against the base when no row has an
    adapter) and ``"effect"`` (how far the adapters move the base), and raises `BenchmarkError` if one of
    the first two exceeds `TOLERANCE` or the effect is too small for the comparison to mean anything.
    """

    def logits(name: str, rows: Sequence[int]) -> Tensor:
        with contenders[name].assigned(rows) as forward:
            return two_steps(forward, tokens)

    with torch.inference_mode():
        empty = [NO_ADAPTER] * len(adapters)
        base, reference = logits("base", empty), logits("peft", adapters)
        scale = float(reference.abs().max())

        def apart(one: Tensor, other: Tensor) -> float:
            return float((one - other).abs().max()) / scale

        found = {
            "adapters": apart(logits("ours", adapters), reference),
            "none": max(apart(logits(name, empty), base) for name in ("ours", "peft")),
            "effect": apart(reference, base),
        }
    for what in ("adapters", "none"):
        if not found[what] <= TOLERANCE:  # a NaN must not pass
            raise BenchmarkError(
                f"The contenders' logits differ by {found[what]:.1e} of the largest ({what}); "
                f"at most {TOLERANCE:.0e} is allowed. Nothing was timed."
            )
    if not found["effect"] >= 100 * TOLERANCE:
        raise BenchmarkError(
            f"The adapters move the logits by {found['effect']:.1e} only; equality says nothing."
        )
    return found


class _OpCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def count_ops(call: Callable[[], Any]) -> int:
    """Aten operations that one call dispatches."""
    with torch.inference_mode(), _OpCounter() as counter:
        call()
    counted: int = counter.count
    return counted
