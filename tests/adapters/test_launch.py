"""Training by several processes: rows are shared out, weights are the same, one process writes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from persona_sdk.adapters import Panacea
from persona_sdk.models import LanguageModel

from . import launched, launched_panacea

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch was built without gloo",
)


def torchrun(program: Any, *arguments: Any) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]
    command = [*launcher, "--standalone", "--nproc-per-node", "2", program.__file__, *map(str, arguments)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def outcomes(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_train_one_adapter_and_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    done = torchrun(launched, tmp_path, -1)
    assert done.returncode == 0, done.stderr
    first, second = outcomes(tmp_path)
    same = ("digest", "tokens", "steps", "losses", "evaluations", "base", "group", "accelerate")
    assert {name: first[name] for name in same} == {name: second[name] for name in same}
    assert first["steps"] == 6  # 8 rows, 2 processes, 2 rows each: two steps an epoch
    for epoch in range(3):
        halves = [set(seen["read"][4 * epoch : 4 * epoch + 4]) for seen in (first, second)]
        assert halves[0] | halves[1] == {str(number) for number in range(8)}
        assert not halves[0] & halves[1]
    assert first["evaluations"] == [[step, float(1 - step)] for step in range(1, 7)]
    assert (first["base"], first["group"], first["accelerate"]) == (True, True, 0)
    assert done.stderr.count("6/6") == 1  # one bar
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-6"]

    other = tmp_path / "interrupted"
    other.mkdir()
    assert torchrun(launched, other, 3).returncode != 0
    assert [path.name for path in (other / "checkpoints").iterdir()] == ["checkpoint-3"]
    done = torchrun(launched, other, -1)
    assert done.returncode == 0, done.stderr
    for whole, resumed in zip((first, second), outcomes(other), strict=True):
        assert resumed["digest"] == whole["digest"]
        assert resumed["losses"] == whole["losses"]
        assert len(resumed["read"]) < len(whole["read"])


def test_two_processes_train_one_panacea_adapter(tmp_path: Path, tiny: LanguageModel) -> None:
    done = torchrun(launched_panacea, tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = outcomes(tmp_path)
    assert first == second
    for variant in launched_panacea.VARIANTS:
        ours, theirs = (Panacea.from_pretrained(tmp_path / rank / variant, base=tiny) for rank in "01")
        assert ours.digest == theirs.digest
        alone = launched_panacea.trained(tiny, variant, 4)
        start = Panacea.random(tiny, alone.config, std=0)
        moved = [float((ours.tensors[name] - start.tensors[name]).abs().max()) for name in ours.tensors]
        assert max(moved) > 1e-3
        assert alone.report is not None
        if variant != "sampled":  # there the processes draw dimensions of their own
            for name, tensor in alone.tensors.items():
                torch.testing.assert_close(ours.tensors[name], tensor, rtol=1e-3, atol=1e-5)
            assert first[variant]["losses"] == pytest.approx(alone.report.losses, rel=1e-4)
            assert first[variant]["tokens"] == alone.report.tokens
    assert len(first["held_out"]["evaluations"]) == 4
