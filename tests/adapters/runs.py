"""Small training runs whose results can be compared bit by bit; also a program, to be killed or launched.

    python runs.py FOLDER DIE        trains with checkpoints in FOLDER, kills itself, prints its result

DIE is ``never``, ``step:N`` (before optimizer step N + 1) or ``write:N`` (when a checkpoint is synced for the
N-th time, half of its files being there).
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from persona_sdk import files
from persona_sdk.adapters.checkpoints import Checkpoints
from persona_sdk.adapters.evaluation import Evaluation
from persona_sdk.adapters.training import TrainingOptions, fit, lora_layers
from persona_sdk.adapters.training_data import encode_rows
from persona_sdk.models import LanguageModel
from persona_sdk.tensors import digest
from persona_sdk.testing import tiny_language_model

DATA = [
    ("How are you?", "Very well."),
    ("What is it?", "A short answer."),
    ("Name?", "Alice"),
    "Two dogs every morning",
    ("Warm?", "Eighty degrees, which is a lot."),
]
# two steps an epoch, four epochs; the rate falls and dropout draws random numbers
STEPS = 8
OPTIONS: dict[str, Any] = {
    "learning_rate": 2e-2,
    "num_train_epochs": 4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "weight_decay": 0.1,
    "seed": 3,
}


def result(
    base: LanguageModel | None = None,
    *,
    checkpoints: Checkpoints | None = None,
    evaluation: Callable[[LanguageModel], Evaluation] | None = None,
    before: Callable[[int], None] = lambda _: None,
    data: Any = DATA,
    rank: int = 2,
    **options: Any,
) -> dict[str, Any]:
    """Train LoRA layers; everything about the outcome but the time it took.

    Args:
        base: None for a new tiny model.
        checkpoints: passed on.
        evaluation: made once the layers are in the model.
        before: called before every step, with the number of steps done in this call.
        data: rows.
        rank: of the layers.
        options: in place of those in `OPTIONS`.
    """
    base = base or tiny_language_model()
    chosen = TrainingOptions(**{**OPTIONS, **options})
    rows = encode_rows(base.tokenizer, data, 64)
    calls = iter(range(10**6))
    modules = list(base.linear_shapes())[:3]
    with lora_layers(base, modules, seed=chosen.seed, rank=rank, alpha=4, dropout=0.2) as factors:
        report = fit(
            base,
            base.module,
            rows,
            chosen,
            check=lambda: before(next(calls)),
            checkpoints=checkpoints,
            evaluation=None if evaluation is None else evaluation(base),
        )
        found = asdict(report) | {"weights": digest(factors())}
    return {name: value for name, value in found.items() if name != "seconds"}


def _kill(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(folder: str, die: str) -> None:
    torch.set_num_threads(1)
    when, _, number = die.partition(":")
    if when == "write":
        syncs, sync = iter(range(10**6)), files.sync
        files.sync = lambda path: _kill() if next(syncs) == int(number) else sync(path)
    options = Checkpoints(folder=Path(folder), every=2)
    stop = int(number) if when == "step" else -1
    found = result(checkpoints=options, before=lambda done: _kill() if done == stop else None)
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
