"""Causal-LM training beside a frozen base, by transformers' Trainer and peft.

    TrainingOptions   what to do, in the names of transformers.TrainingArguments
    fit               any module with trainable parameters around the base, on rows of token ids
    train_low_rank    peft LoRA layers on chosen modules -> a low-rank bundle
    TrainingReport    what it took

The base is borrowed (`persona_sdk.adapters.borrowing`). Nothing is written outside a temporary folder, unless
`Checkpoints` name one; an `Evaluation` picks the best weights and stops early. Under torchrun or
``accelerate launch`` every process trains on its share of the rows.

On one machine and device the same data, options and seed give the same weights, bit by bit on CPU.
"""

import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from persona_sdk.adapters import peft_format
from persona_sdk.adapters.borrowing import borrowed
from persona_sdk.adapters.checkpoints import Checkpoints, describe_run
from persona_sdk.adapters.evaluation import Evaluation, HeldOut
from persona_sdk.adapters.random_state import seed_everything
from persona_sdk.adapters.resumable import Resumable, learned_tensors
from persona_sdk.adapters.training_data import Row, collate, encode_rows, pad_token
from persona_sdk.adapters.watch import diverged, watch
from persona_sdk.config import FrozenConfig
from persona_sdk.errors import InvalidInputError
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
    bf16: bool = Field(False, description="compute in bfloat16 by autocast; what is trained stays float32")
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
        tokens: tokens read, padding not counted; under preferences, since the run was resumed.
        seconds: wall time; of a resumed run, since it was resumed.
        first_loss: mean loss of the first step.
        last_loss: mean loss of the last step.
        losses: mean loss of every step.
        evaluations: step and score of every evaluation.
        best_step: step of the best score, whose weights these are; None without an evaluation.
        stopped_early: patience ended the training before its last step.
    """

    rows: int
    steps: int
    tokens: int
    seconds: float
    first_loss: float
    last_loss: float
    losses: tuple[float, ...] = field(default=(), repr=False)
    evaluations: tuple[tuple[int, float], ...] = ()
    best_step: int | None = None
    stopped_early: bool = False


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
    checkpoints: Checkpoints | None = None,
    evaluation: Evaluation | None = None,
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
        checkpoints: where to keep checkpoints, and to go on from.
        evaluation: how to score the weights; those of the best score are returned.

    Raises:
        InvalidInputError: unusable data, or checkpoints of another run.
        AdapterError: the loss or the weights became NaN or infinite.
    """
    rows = encode_rows(model.tokenizer, data, min(options.max_length, model.context_length))
    with lora_layers(model, modules, seed=options.seed, rank=rank, alpha=alpha, dropout=dropout) as factors:
        report = fit(
            model,
            model.module,
            rows,
            options,
            progress=progress,
            checkpoints=checkpoints,
            evaluation=evaluation,
        )
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
    collator: Callable[..., dict[str, Any]] | None = None,
    check: Callable[[], None] = lambda: None,
    checkpoints: Checkpoints | None = None,
    evaluation: Evaluation | None = None,
    callbacks: Sequence[Any] = (),
) -> TrainingReport:
    """Train whatever in `trainable` asks for gradients. Call it inside `borrowed`.

    Args:
        model: the base model, for device and padding.
        trainable: takes ``input_ids, attention_mask, labels`` and returns an output with a ``loss``.
        rows: encoded rows.
        options: how to train.
        progress: show a bar; None shows it on a terminal. Under torchrun only the first process has one.
        collator: makes a batch of rows, given ``pad_id``; None: `collate`. It must not draw random numbers:
            it runs ahead of the steps, and a resumed run would draw others.
        check: called before every step; what it raises ends the training.
        checkpoints: where to keep checkpoints, and to go on from.
        evaluation: how to score the weights; those of the best score are left in `trainable`.
        callbacks: further ``transformers.TrainerCallback`` objects, such as those for TensorBoard.

    Raises:
        AdapterError: the loss, a weight or a score became NaN or infinite, or the disk refused a checkpoint.
        InvalidInputError: the checkpoints found belong to another run.
    """
    from transformers import PrinterCallback, Trainer, TrainingArguments

    if model.device.type == "cpu" and hasattr(model.module, "set_attn_implementation"):
        # The backward of fused attention takes a quarter of a step on CPUs. `borrowed` puts the old one back.
        model.module.set_attn_implementation("eager")
    started = time.perf_counter()
    learned = partial(learned_tensors, trainable, model.module)
    held_out = None if evaluation is None else HeldOut(evaluation, trainable, learned)
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
            use_cache=False,
            ddp_find_unused_parameters=False,
            **options.model_dump(include=set(TrainingOptions.model_fields) - {"max_length"}),
        )
        if arguments.n_gpu > 1:  # one module in memory: no data parallel copies of it
            arguments._n_gpu = 1
        if arguments.world_size > 1:
            _require_own_device(model, arguments)
        watching = watch(progress, check, held_out, checkpoints)
        trainer: Any = type("PersonaTrainer", (Resumable, Trainer), {})(
            model=trainable,
            args=arguments,
            train_dataset=list(rows),
            data_collator=partial(collator or collate, pad_id=pad_token(model.tokenizer)),
            callbacks=[watching, *callbacks],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.learned, trainer.held_out, trainer.checkpoints = learned, held_out, checkpoints
        if checkpoints is not None:
            judged = evaluation and [evaluation.every, evaluation.patience, evaluation.min_delta]
            more = {"processes": arguments.world_size, "evaluation": judged}
            trainer.run = describe_run(
                options.model_dump(mode="json"), rows, model.fingerprint, learned(), **more
            )
        try:
            trainer.go()
        finally:
            watching.close()
    state = trainer.state
    for name, parameter in trainable.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            raise diverged(f"{name} holds NaN or infinity after step {state.global_step}")
    losses = tuple(float(entry["loss"]) for entry in state.log_history if "loss" in entry)
    return TrainingReport(
        rows=len(rows),
        steps=state.global_step,
        tokens=int(state.num_input_tokens_seen),
        seconds=time.perf_counter() - started,
        first_loss=losses[0],
        last_loss=losses[-1],
        losses=losses,
        evaluations=tuple(held_out.scores) if held_out else (),
        best_step=held_out.best_step if held_out else None,
        stopped_early=bool(held_out and held_out.exhausted and state.global_step < state.max_steps),
    )


def _require_own_device(model: LanguageModel, arguments: Any) -> None:
    """Each process must have loaded the base where it trains: the Trainer would move it for good."""
    if model.device.type != arguments.device.type or (model.device.index or 0) != (
        arguments.device.index or 0
    ):
        raise InvalidInputError(
            f"This process trains on {arguments.device}, and its base model is on {model.device}.",
            hint="Load the base with device=f'cuda:{os.environ[\"LOCAL_RANK\"]}'.",
        )
