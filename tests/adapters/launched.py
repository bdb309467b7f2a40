"""What a user's training script does under torchrun; each process writes what it saw to FOLDER/RANK.json."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import PartialState

from persona_sdk.adapters import LoRA, training
from persona_sdk.adapters.checkpoints import Checkpoints
from persona_sdk.adapters.evaluation import Evaluation
from persona_sdk.testing import tiny_language_model

ROWS = [f"Row {number} has a text of its own" for number in range(8)]


def main(folder: Path, stop: int) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    base = tiny_language_model()
    before = {name: tensor.clone() for name, tensor in base.module.state_dict().items()}
    read, collate = [], training.collate

    def noted(rows, pad_id):
        read.extend(base.tokenizer.decode(row["input_ids"]).split()[1] for row in rows)
        return collate(rows, pad_id)

    training.collate = noted
    calls = iter(range(1000))

    def score() -> float:
        call = next(calls)
        if call == stop:
            os._exit(9)  # every process: as when a machine goes down
        return float(-call * (1 + rank))  # processes disagree; the first one decides

    adapter = LoRA.train(
        base,
        ROWS,
        {"rank": 2, "dropout": 0.1, "num_train_epochs": 3, "per_device_train_batch_size": 2},
        progress=True,
        checkpoints=Checkpoints(folder=folder / "checkpoints", every=1),
        evaluation=Evaluation(score, every=1),
    )
    after = base.module.state_dict()
    seen = {
        "digest": adapter.digest,
        "read": read,
        "tokens": adapter.report.tokens,
        "steps": adapter.report.steps,
        "losses": adapter.report.losses,
        "evaluations": adapter.report.evaluations,
        "accelerate": len(PartialState._shared_state),
        "base": before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before),
        "group": torch.distributed.is_initialized(),
    }
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
