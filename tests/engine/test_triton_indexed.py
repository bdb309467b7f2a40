"""The Triton kernels, in processes of their own: see triton_process.py for what is asked of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("triton")


def run(wanted: str, **environment: str) -> None:
    """Run the tests whose names hold a word; Triton reads the environment when it is imported."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    command = [sys.executable, "-m", "pytest", "tests/engine/triton_process.py", "-k", wanted]
    command += ["-q", "-x", "--noconftest", "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, cwd=ROOT, env={**kept, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def test_the_kernels_are_the_formula_in_the_interpreter():
    run("formula or cpu", TRITON_INTERPRET="1")


def test_the_kernels_become_machine_code():
    run("compiled")


@pytest.mark.gpu
def test_the_kernels_are_the_formula_on_a_device():
    run("formula")
