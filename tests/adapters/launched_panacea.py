"""Panacea under torchrun: each process trains every variant, and writes adapters to FOLDER/RANK/VARIANT."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from persona_sdk.adapters import Panacea
from persona_sdk.models import LanguageModel
from persona_sdk.testing import tiny_language_model

ROWS = {
    "concise": [(f"Question {number}?", "Yes.") for number in range(4)],
    "detailed": [(f"Question {number}?", f"Yes, and here is why {number}.") for number in range(4)],
}
# a step reads all four items, so an optimizer step is the same however they are shared out
OPTIONS: dict[str, Any] = {
    "dimensions": tuple(ROWS),
    "rank": 2,
    "max_steps": 4,
    "target_modules": ("q_proj", "v_proj"),
    "lr_scheduler_type": "constant",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "batch": {},
    "sampled": {"sampled_objective": True},
    "held_out": {"eval_steps": 1, "early_stopping_patience": 1},
}


def trained(base: LanguageModel, variant: str, items: int) -> Panacea:
    """The adapter of a variant, with so many items of a step in this process."""
    held_out = ROWS if variant == "held_out" else None
    options = {**OPTIONS, **VARIANTS[variant], "per_device_train_batch_size": items}
    return Panacea.train(base, ROWS, options, held_out=held_out)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank, base, seen = os.environ["RANK"], tiny_language_model(), {}
    for variant in VARIANTS:
        adapter = trained(base, variant, 2)
        adapter.save_pretrained(folder / rank / variant)
        assert adapter.report is not None
        seen[variant] = {
            "tokens": adapter.report.tokens,
            "losses": adapter.report.losses,
            "evaluations": adapter.report.evaluations,
        }
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
