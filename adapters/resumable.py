"""transformers' Trainer with the checkpoints of `persona_sdk.adapters.checkpoints` in place of pickled ones.

Resuming gives the weights of an uninterrupted run, bit by bit on one machine and CPU, if everything random in
training comes from the global generators of Python, NumPy and torch, and batches are made without randomness:
they are made ahead of the step that a checkpoint belongs to. The order of rows is a function of seed and
epoch, the same on every process, so it needs no state.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from persona_sdk.adapters import checkpoints
from persona_sdk.adapters.checkpoints import Checkpoint, Checkpoints
from persona_sdk.adapters.evaluation import HeldOut, copy_into
from persona_sdk.adapters.random_state import random_state, set_random_state
from persona_sdk.errors import InvalidInputError


def learned_tensors(trainable: nn.Module, base: nn.Module) -> dict[str, Tensor]:
    """What training changes: parameters that ask for gradients, and buffers that are not the base's."""
    frozen = {id(buffer) for buffer in base.buffers()}
    found: dict[str, Tensor] = {n: p for n, p in trainable.named_parameters() if p.requires_grad}
    return found | {n: b for n, b in trainable.named_buffers() if id(b) not in frozen}


class Resumable:
    """Mixin before ``transformers.Trainer``; `go` replaces ``train``."""

    learned: Callable[[], dict[str, Tensor]]
    held_out: HeldOut | None = None
    checkpoints: Checkpoints | None = None
    run: Mapping[str, Any]

    # the Trainer's, which is loaded when first needed
    args: Any
    accelerator: Any
    state: Any
    control: Any
    optimizer: Any
    lr_scheduler: Any
    train_dataset: Any
    train: Any

    def go(self) -> None:
        """Train to the end, from the newest checkpoint of this run if there is one.

        Raises:
            InvalidInputError: the folder holds another run's checkpoints, or processes see different ones.
            AdapterError: a checkpoint could not be written.
        """
        found = None if self.checkpoints is None else checkpoints.find(self.checkpoints.folder, self.run)
        if self.args.world_size > 1:
            step = torch.tensor([found.step if found else 0], device=self.args.device)
            if len(set(self.accelerator.gather(step).tolist())) > 1:
                raise InvalidInputError(
                    "The processes see different checkpoints.", hint="Use a folder that all machines share."
                )
        if found is not None and self._finished(found):
            from transformers import TrainerState

            self._load_from_checkpoint(str(found.path))
            self.state = TrainerState.load_from_json(str(found.path / "trainer_state.json"))
        else:
            self.train(resume_from_checkpoint=None if found is None else str(found.path))
        if self.held_out is not None:
            self.held_out.put_back()

    def _finished(self, found: Checkpoint) -> bool:
        state = found.data("trainer_state")
        return bool(state["global_step"] >= state["max_steps"] or found.data("evaluation")["stopped"])

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        lengths = [len(row["input_ids"]) for row in self.train_dataset]
        return ByLength(
            lengths, self.args.train_batch_size * self.args.gradient_accumulation_steps, self.args.seed, self
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        assert self.checkpoints is not None
        states = {
            name: self.accelerator.gather(part[None].to(self.args.device)).cpu()
            for name, part in random_state(self.args.device).items()
        }
        if not self.args.should_save:
            return
        optimizer = self.optimizer.state_dict()
        bundles = {
            "weights": self.learned(),
            "random": states,
            "optimizer": {
                f"{index}.{name}": tensor
                for index, moments in optimizer["state"].items()
                for name, tensor in moments.items()
            },
        }
        scores: list[tuple[int, float]] = []
        if self.held_out is not None:
            scores = self.held_out.scores
            bundles["best"] = self.held_out.best
        data = {
            "optimizer": optimizer["param_groups"],
            "scheduler": self.lr_scheduler.state_dict(),
            "evaluation": {"scores": scores, "stopped": bool(self.control.should_training_stop)},
            "trainer_state": asdict(self.state),
        }
        checkpoints.write(self.checkpoints, self.state.global_step, self.run, bundles, data)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        found = Checkpoint(Path(resume_from_checkpoint))
        copy_into(self.learned(), found.tensors("weights"))
        if self.held_out is not None:
            scores = found.data("evaluation")["scores"]
            self.held_out.scores = [(int(step), float(score)) for step, score in scores]
            self.held_out.best = found.tensors("best")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        found = Checkpoint(Path(checkpoint))
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in found.tensors("optimizer").items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = tensor
        groups = [{**group, "betas": tuple(group["betas"])} for group in found.data("optimizer")]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.lr_scheduler.load_state_dict(found.data("scheduler"))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            states = Checkpoint(Path(checkpoint)).tensors("random")
            own = {name: part[self.args.process_index] for name, part in states.items()}
            set_random_state(own, self.args.device)


class ByLength(torch.utils.data.Sampler[int]):
    """Rows of about the same length together, in an order that seed and epoch decide.

    Args:
        lengths: of every row.
        batch: rows of one optimizer step.
        seed: of the run.
        trainer: its state knows the epoch.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int, trainer: Any) -> None:
        self._lengths, self._batch, self._seed, self._trainer = list(lengths), batch, seed, trainer

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        from transformers.trainer_pt_utils import LengthGroupedSampler

        epoch = int(self._trainer.state.epoch or 0)  # a whole number whenever an epoch begins
        generator = torch.Generator().manual_seed(random.Random(f"{self._seed} {epoch}").getrandbits(32))
        return iter(LengthGroupedSampler(self._batch, lengths=self._lengths, generator=generator))
