"""What happens around the steps of a training run: the caller's check, evaluations, checkpoints, a bar."""

import math
import sys
from collections.abc import Callable
from typing import Any

from persona_sdk.adapters.checkpoints import Checkpoints
from persona_sdk.adapters.evaluation import HeldOut
from persona_sdk.errors import AdapterError


def diverged(what: str) -> AdapterError:
    """The error for a training run whose numbers are none."""
    return AdapterError(
        f"Training diverged: {what}. No adapter was made.",
        hint="Lower learning_rate, or look for odd rows in the data.",
    )


def watch(
    progress: bool | None,
    check: Callable[[], None],
    held_out: HeldOut | None,
    checkpoints: Checkpoints | None,
) -> Any:
    """A Trainer callback that asks to go on, stops at a bad loss, evaluates, saves and draws the bar.

    Args:
        progress: show a bar; None shows it on a terminal.
        check: called before every step.
        held_out: what to evaluate, when, and whether to stop.
        checkpoints: when to save.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from transformers import TrainerCallback

    show = sys.stderr.isatty() if progress is None else progress

    class Watch(TrainerCallback):  # type: ignore[misc]  # transformers is loaded when first needed
        bar: Progress | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not show or not state.is_world_process_zero:
                return
            self.bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self.bar.start()
            self.task = self.bar.add_task(
                "training", total=state.max_steps, completed=state.global_step, loss="-"
            )

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            check()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            """After every step; the Trainer saves after it."""
            if "loss" not in (logs or {}):
                return
            step, loss = state.global_step, float(logs["loss"])
            if not math.isfinite(loss):
                raise diverged(f"the loss is {loss} at step {step}")
            if held_out is not None and held_out.is_due(step, last=control.should_training_stop):
                held_out.run(step)
                control.should_training_stop |= held_out.exhausted
            if checkpoints is not None:
                control.should_save = step % checkpoints.every == 0 or control.should_training_stop
            if self.bar is not None:
                self.bar.update(self.task, completed=step, loss=f"{loss:.3f}")

        def close(self) -> None:
            if self.bar is not None:
                self.bar.stop()

    return Watch()
