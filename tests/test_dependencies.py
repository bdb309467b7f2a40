"""Which part may import which, read from the sources; and what `import persona_sdk` must not load.

`MAY_IMPORT` is the whole rule: a row is a module or a package (written ``adapters.*``), the longest match
counts. What is not listed (compose, model, persona, cli, ...) sits on top and may import anything that does
not make a cycle. Imports under ``if TYPE_CHECKING:`` never run and do not count; those in functions do.
"""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"persona_sdk": ROOT / "persona_sdk", "persona_sdk.adapters": ROOT / "adapters"}
FOLDERS["persona_sdk.memory"] = ROOT / "memory"

PURE = {"errors", "config", "files", "tensors", "plan"}
MEASURED = {"machine", "packed", "precision"}
LOADING = MEASURED | {"devices", "hub", "wheels", "weights", "fingerprints", "embedders", "models"}

MAY_IMPORT: dict[str, set[str]] = {
    # the narrow waist: pure data, nothing above it
    "errors": set(),
    "files": set(),
    "config": {"errors"},
    "tensors": {"errors"},
    "plan": {"errors", "config", "tensors"},
    "prompting": PURE,
    "passage_spans": {"prompting"},
    # where base models come from
    "machine": {"files"},
    "packed": set(),
    "precision": {"files", "machine", "packed"},
    "devices": {"errors", "precision"},
    "hub": {"errors"},
    "wheels": {"errors", "files"},
    "convert": set(),
    "weights": {"errors", "files", "hub", "wheels"},
    "fingerprints": {"files", "weights"},
    "embedders": PURE | LOADING - {"models"},
    "models": PURE | LOADING,
    "testing": PURE | LOADING,
    # pure low-rank algebra, then the families: no store, no engine, no user
    "adapters.lowrank": PURE,
    "adapters.dominance": {"errors"},
    "adapters.fronts": {"errors", "adapters.dominance"},
    "adapters.*": PURE | LOADING | {"prompting", "adapters.*"},
    "front_style": {"errors", "adapters.fronts"},
    "front_maps": {"front_style", "adapters.fronts"},
    "front_plots": {"front_maps", "front_style", "adapters.dominance", "adapters.fronts"},
    "preference_files": {"errors", "adapters.preference_data"},
    "pareto_report": {"errors", "models", "preference_files", "adapters.*"},
    # memory stores opaque, hashed blobs and knows nobody
    "memory.*": {"errors", "config", "files", "tensors", "memory.*"},
    # the engine knows plan parts and token ids
    "engine.*": PURE | {"models", "machine", "packed", "engine.*"},
}


def in_package(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def covers(row: str, module: str) -> bool:
    return in_package(module, row[:-2]) if row.endswith(".*") else module == row


def modules() -> dict[str, Path]:
    """Dotted name below ``persona_sdk`` ("" for the package itself) -> file."""
    found = {}
    for package, folder in FOLDERS.items():
        for file in folder.rglob("*.py"):
            if package == "persona_sdk" and file.relative_to(folder).parts[0] in ("adapters", "memory"):
                continue  # the symlinks; their targets have a row of their own
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            name = ".".join(part for part in parts if part != "__init__")
            found[name.removeprefix("persona_sdk").lstrip(".")] = file
    return found


def imports(file: Path, known: dict[str, Path]) -> set[str]:
    """Our modules that a file imports when it, or a function in it, runs."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import; absolute ones read the same from everywhere"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if in_package(name, "persona_sdk"):
                inner = name.removeprefix("persona_sdk").lstrip(".")
                found.add(inner if inner in known else inner.rpartition(".")[0])
    return found


KNOWN = modules()
GRAPH = {name: imports(file, KNOWN) - {name} for name, file in KNOWN.items()}


def test_the_reader_finds_the_modules_and_their_imports():
    assert {"", "errors", "adapters", "adapters.base", "memory", "engine.low_rank.rows"} <= set(KNOWN)
    assert {"errors", "config", "tensors"} <= GRAPH["plan"]
    assert GRAPH["weights"] == {"errors", "files", "hub", "wheels"}


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_imports_point_downwards(name):
    rows = [row for row in MAY_IMPORT if covers(row, name)]
    if not rows:
        return
    allowed = MAY_IMPORT[max(rows, key=len)]
    above = {other for other in GRAPH[name] if not any(covers(row, other) for row in allowed)}
    assert not above, f"persona_sdk.{name} imports {sorted(above)}; it may import {sorted(allowed)}"


def test_every_row_of_the_table_is_about_something():
    dead = [row for row in MAY_IMPORT if not any(covers(row, name) for name in KNOWN)]
    assert not dead


def test_there_are_no_cycles():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail("Import cycle: " + " -> ".join(error.args[1]))


def test_importing_the_package_loads_nothing_heavy():
    program = "import sys, persona_sdk; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    heavy = {
        "torch",
        "transformers",
        "faiss",
        "sqlalchemy",
        "pydantic",
        "numpy",
        "sentence_transformers",
        "peft",
    }
    assert "persona_sdk" in done.stdout.split()
    assert not heavy & set(done.stdout.split())
