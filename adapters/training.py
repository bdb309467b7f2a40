"""Causal-LM training beside a frozen base, by transformers' Trainer and peft.

The base model is borrowed, not copied: peft puts its layers into it while training. `borrowed` holds the
model's lock, takes a picture of the module tree before and restores it afterwards, whatever happened in
between, together with the caller's random state. Nothing is written outside a temporary folder.

    TrainingOptions   what to do, in the names of transformers.TrainingArguments
    fit               any module with trainable parameters around the base, on rows of token ids
    train_low_rank    peft LoRA layers on chosen modules -> a low-rank bundle
    TrainingReport    what it took

On one machine and device the same data, options and seed give the same weights, bit by bit on CPU.
"""

import logging
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy
import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from persona_sdk.adapters import peft_format
from persona_sdk.adapters.training_data import Row, collate, encode_rows, pad_token
from persona_sdk.config import FrozenConfig
from persona_sdk.errors import AdapterError
from persona_sdk.models import LanguageModel
from persona_sdk.tensors import TensorBundle, low_rank_bundle

logger = logging.getLogger("persona_sdk.adapters.training")


class TrainingOptions(FrozenConfig):
    """How to train. Names and meanings are those of ``transformers.TrainingArguments`` (and TRL)."""

    learning_rate: float = Field(1e-3, gt=0)
    num_train_epochs: float = Field(3.0, gt=0)
    max_steps: int = Field(-1, description="optimizer steps; overrides num_train_epochs unless -1")
    per_device_train_batch_size: int = Field(4, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    max_length: int = Field(512, ge=2, description="tokens per row; the context window if that is shorter")
    seed: int = Field(0, ge=0, lt=2**32)

    @field_validator("max_steps")
    @classmethod
    def _some_steps(cls, value: int) -> int:
        if value != -1 and value < 1:
            raise ValueError("must be at least 1, or -1 to go by num_train_epochs")
        return value


@dataclass(frozen=True)
class TrainingReport:
    """What a training run did.

    Args:
        rows: training rows after encoding.
        steps: optimizer steps.
        tokens: tokens read, padding not counted.
        seconds: wall time.
        first_loss: mean loss of the first step.
        last_loss: mean loss of the last step.
    """

    rows: int
    steps: int
    tokens: int
    seconds: float
    first_loss: float
    last_loss: float


def train_low_rank(
    model: LanguageModel,
    data: Any,
    options: TrainingOptions,
    *,
    modules: Sequence[str],
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    progress: bool | None = None,
) -> tuple[TensorBundle, TrainingReport]:
    """Train LoRA factors on the named modules; the scale ``alpha / rank`` ends up in B.

    Args:
        model: the base; locked while training and unchanged afterwards.
        data: see `persona_sdk.adapters.training_data`.
        options: how to train.
        modules: full paths of linear maps.
        rank: of every module.
        alpha: LoRA's alpha.
        dropout: on the input of A, while training.
        progress: show a bar; None shows it on a terminal.

    Raises:
        InvalidInputError: unusable data.
        AdapterError: the loss or the weights became NaN or infinite.
    """
    rows = encode_rows(model.tokenizer, data, min(options.max_length, model.context_length))
    with lora_layers(model, modules, seed=options.seed, rank=rank, alpha=alpha, dropout=dropout) as factors:
        report = fit(model, model.module, rows, options, progress=progress)
        return factors(), report


@contextmanager
def lora_layers(
    model: LanguageModel, modules: Sequence[str], *, seed: int, rank: int, alpha: float, dropout: float = 0.0
) -> Iterator[Callable[[], TensorBundle]]:
    """Put peft's LoRA layers into the base for the length of the block, and only them in training.

    The block gets a function that reads the factors as they are then, ``alpha / rank`` folded into B.
    Arguments as for `train_low_rank`; the seed draws A.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    def factors() -> TensorBundle:
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for path, part in model.module.named_modules():
            if isinstance(part, LoraLayer):
                A, B = (side["default"].weight.detach().cpu() for side in (part.lora_A, part.lora_B))
                found[path] = (A.clone(), B * (alpha / rank))
        return low_rank_bundle(found)

    with borrowed(model):
        seed_everything(seed)
        lora = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=list(modules),
            fan_in_fan_out=peft_format.is_transposed(model, modules),
        )
        inject_adapter_in_model(lora, model.module)
        for parameter in model.module.parameters():
            if parameter.requires_grad:  # float32 also beside a base in half precision
                parameter.data = parameter.data.float()
        yield factors


def fit(
    model: LanguageModel,
    trainable: nn.Module,
    rows: Sequence[Row],
    options: TrainingOptions,
    *,
    progress: bool | None = None,
    collator: Callable[..., dict[str, Tensor]] | None = None,
    check: Callable[[], None] = lambda: None,
) -> TrainingReport:
    """Train whatever in `trainable` asks for gradients. Call it inside `borrowed`.

    Args:
        model: the base model, for device and padding.
        trainable: takes ``input_ids, attention_mask, labels`` and returns an output with a ``loss``.
        rows: encoded rows.
        options: how to train.
        progress: show a bar; None shows it on a terminal.
        collator: makes a batch of rows, given ``pad_id``; None: `collate`.
        check: called before every step; what it raises ends the training.

    Raises:
        AdapterError: the loss or a weight became NaN or infinite.
    """
    from transformers import PrinterCallback, Trainer, TrainingArguments

    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="persona-train-") as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            use_cpu=model.device.type == "cpu",
            disable_tqdm=True,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            logging_nan_inf_filter=False,
            include_num_input_tokens_seen="non_padding",
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            label_names=["labels"],
            train_sampling_strategy="group_by_length",
            use_cache=False,
            **options.model_dump(include=set(TrainingOptions.model_fields) - {"max_length"}),
        )
        if arguments.n_gpu > 1:  # one module in memory: no data parallel copies of it
            arguments._n_gpu = 1
        watch = _watch(progress, check)
        trainer = Trainer(
            model=trainable,
            args=arguments,
            train_dataset=list(rows),
            data_collator=partial(collator or collate, pad_id=pad_token(model.tokenizer)),
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
        finally:
            watch.close()
    for name, parameter in trainable.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            raise _diverged(f"{name} holds NaN or infinity after step {trainer.state.global_step}")
    return TrainingReport(
        rows=len(rows),
        steps=trainer.state.global_step,
        tokens=int(trainer.state.num_input_tokens_seen),
        seconds=time.perf_counter() - started,
        first_loss=watch.losses[0],
        last_loss=watch.losses[-1],
    )


@contextmanager
def borrowed(model: LanguageModel) -> Iterator[nn.Module]:
    """Lend the base module for training: locked, and put back exactly as it was.

    Restores the module tree, hooks, modes, gradient flags and configuration of the module, and the random
    state of Python, NumPy and torch. Weights are not copied: they are frozen, and nothing may write them.
    """
    with model.lock, _same_random_state(), _same_accelerator():
        picture = [_picture(part.__dict__) for part in model.module.modules()]
        settings = [
            _picture(part.__dict__)
            for part in (model.module.config, getattr(model.module, "generation_config", None))
            if part is not None
        ]
        flags = [(parameter, parameter.requires_grad) for parameter in model.module.parameters()]
        try:
            yield model.module
        finally:
            for place, content, inner in [*picture, *settings]:
                place.clear()
                place.update(content)
                for mapping, values in inner:
                    mapping.clear()
                    mapping.update(values)
            for parameter, wanted in flags:
                parameter.requires_grad_(wanted)
                parameter.grad = None


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch; call it inside `borrowed`, which restores their state."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def _picture(place: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], list[tuple[Any, Any]]]:
    """An object's attributes, and the content of those that are dictionaries (children, hooks, ...)."""
    content = dict(place)
    return place, content, [(value, dict(value)) for value in content.values() if isinstance(value, dict)]


@contextmanager
def _same_random_state() -> Iterator[None]:
    python, arrays = random.getstate(), numpy.random.get_state()
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(arrays)


@contextmanager
def _same_accelerator() -> Iterator[None]:
    """Trainer keeps process-wide state in accelerate; put back what the caller had there."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    shared = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in shared]
    try:
        yield
    finally:
        for state, content in zip(shared, before, strict=True):
            state.clear()
            state.update(content)


def _diverged(what: str) -> AdapterError:
    return AdapterError(
        f"Training diverged: {what}. No adapter was made.",
        hint="Lower learning_rate, or look for odd rows in the data.",
    )


def _watch(progress: bool | None, check: Callable[[], None]) -> Any:
    """A Trainer callback that keeps the losses, stops at the first bad one, asks to go on, draws the bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from transformers import TrainerCallback

    show = sys.stderr.isatty() if progress is None else progress

    class Watch(TrainerCallback):  # type: ignore[misc]  # transformers is loaded when first needed
        def __init__(self) -> None:
            self.losses: list[float] = []
            self.bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                disable=not show,
            )

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar.start()
            self.task = self.bar.add_task("training", total=state.max_steps, loss="-")

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            check()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" not in (logs or {}):
                return
            self.losses.append(float(logs["loss"]))
            if not math.isfinite(self.losses[-1]):
                raise _diverged(f"the loss is {self.losses[-1]} at step {state.global_step}")
            self.bar.update(self.task, completed=state.global_step, loss=f"{self.losses[-1]:.3f}")

        def close(self) -> None:
            self.bar.stop()

    return Watch()
