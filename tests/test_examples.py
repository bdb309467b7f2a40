"""Every example runs as it stands, in a process and a folder of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
ARGUMENTS = {"demo.py": ["--steps", "4"]}
NEEDS_WEIGHTS = {"demo.py", "hello.py"}


def cases():
    for path in sorted(EXAMPLES.glob("*.py")):
        marks = [pytest.mark.model] if path.name in NEEDS_WEIGHTS else []
        yield pytest.param(path, id=path.name, marks=marks)


def run(path: Path, folder: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "COLUMNS": "200"}
    command = [sys.executable, str(path), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", list(cases()))
def test_example(path, tmp_path):
    printed = run(path, tmp_path, *ARGUMENTS.get(path.name, []))
    assert printed.strip()
    if path.name == "panacea.py":
        assert "ann {'calm': 1.0, 'loud': 0.0}: hm hm" in printed
        assert "bob {'calm': 0.0, 'loud': 1.0}: HA HA" in printed
    if path.name == "demo.py":
        for told in (
            "base",
            "alice/voice@",
            "bookclub/gothic@",
            "I love to bake cookies",
            "persona chat --user alice",
        ):
            assert told in printed
        again = run(path, tmp_path, *ARGUMENTS["demo.py"])
        assert "in the store already" in again
        panels = printed[printed.index("4. one batch") : printed.index("5. why")].splitlines()[2:]
        assert panels == again[again.index("4. one batch") : again.index("5. why")].splitlines()[2:]
