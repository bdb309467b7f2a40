"""Every block of the README runs: Python with its printed output, shell line by line."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numba  # noqa: F401 - now: it looks at `print` when it is imported, and the examples run under another one
import pytest
from pytest_examples import CodeExample, EvalExample, find_examples

from persona_sdk.memory import CubeDraft, MemoryStore

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SHELL = re.findall(r"^```(?:bash|sh|shell)\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.model
@pytest.mark.parametrize(
    "example", list(find_examples(str(README))), ids=lambda example: str(example.start_line)
)
def test_python_block_prints_what_it_says(
    example: CodeExample, eval_example: EvalExample, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    eval_example.set_config(line_length=110, ruff_ignore=["D", "T20", "I"], target_version="py311")
    eval_example.run_print_check(example)


def shell_lines():
    for block in SHELL:
        for line in block.splitlines():
            if line.strip() and not line.startswith("#"):
                yield line.split("  #")[0].strip()


@pytest.mark.model
def test_shell_blocks(tmp_path):
    """`persona` lines run in order beside a store that knows alice, as the blocks above leave it; `make`
    targets must exist (CI runs them).
    """
    with MemoryStore.open(tmp_path / "personas") as store:
        store.commit("alice", add=[CubeDraft(text="Alice has a greyhound called Biscuit.")])
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONWARNINGS": "ignore"}
    seen = list(shell_lines())
    assert seen
    for line in seen:
        words = shlex.split(line)
        match words[0]:
            case "persona" | "python":
                done = subprocess.run(
                    words,
                    cwd=ROOT if words[0] == "python" else tmp_path,
                    env=environment,
                    capture_output=True,
                    text=True,
                    input="/quit\n",
                    timeout=600,
                )
                assert done.returncode == 0, f"{line}\n{done.stderr}"
            case "make":
                assert words[1] in targets, line
            case "pip" | "git" | "cd":
                continue
            case _:
                pytest.fail(f"README has a shell line nobody checks: {line}")
