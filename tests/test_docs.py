"""The blocks of docs/panacea.md run in order, in one folder: Python with what it prints, then the shell's."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numba  # noqa: F401 - now: it looks at `print` when it is imported, and the examples run under another one
from pytest_examples import EvalExample, find_examples

PAGE = Path(__file__).parents[1] / "docs" / "panacea.md"


def test_panacea_page(eval_example: EvalExample, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    eval_example.set_config(line_length=120, target_version="py311")
    known = {}
    for example in find_examples(str(PAGE)):
        if example.prefix_settings().get("test") != "skip":
            known = eval_example.run_print_check(example, module_globals=known)
    known["model"].close()

    known["base"].module.save_pretrained("model")
    known["base"].tokenizer.save_pretrained("model")
    rows = [
        {"dimension": name, "prompt": prompt, "completion": reply}
        for name, pairs in known["data"].items()
        for prompt, reply in pairs
    ]
    for name in ("train.jsonl", "held_out.jsonl"):
        Path(name).write_text("\n".join(map(json.dumps, rows)))
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    for line in "".join(blocks).splitlines():
        command = [sys.executable, "-m", "persona_sdk.cli", *shlex.split(line)[1:], "--model", "model"]
        done = subprocess.run(
            command,
            env=os.environ | {"PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert Path("by-command").is_dir()
    assert json.loads(Path("front.json").read_text())["adapter"] == "shared/styles"
    assert Path("front.png").exists()
