"""Panacea against what it is compared with, on equal total compute: fronts, calibration, controls.

    python -m benchmarks.panacea [--quick] [--json FILE] [--data DIR] [--resume DIR] [--part NAME ...]

| part   | data                                                 | objective | methods                        |
|--------|------------------------------------------------------|-----------|--------------------------------|
| styles | rule-made answers, concise and formal                | SFT       | all of `panacea_methods`       |
| three  | the same with casual                                 | SFT       | panacea, experts               |
| pairs  | rule-made pairs that brief and formal label opposite | DPO       | panacea, experts, s at 0       |
| real   | shorter and longer responses to real prompts         | SFT       | panacea, experts, joint, s at 0|

Base model: SmolLM2-135M in bfloat16, adapters in float32; all methods are trained and evaluated so.
`panacea_methods` says how compute is counted, `panacea_stats` what the intervals are and where hypervolumes
are measured from. Data for "real" is not part of the project; see the README of the data folder.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from benchmarks import harness, panacea_data
from benchmarks.harness import Cells, Result
from benchmarks.panacea_methods import KINDS, Fit, Scorer
from benchmarks.panacea_report import summarise
from benchmarks.panacea_scores import Base, evaluate
from persona_sdk.adapters.panacea import PanaceaConfig
from persona_sdk.models import LanguageModel

ALL = tuple(KINDS)


@dataclass(frozen=True)
class Part:
    """One study: its data, how the adapter is trained on it, and which methods take part."""

    make: Callable[["Setting", int], panacea_data.Study | None]
    kinds: tuple[str, ...]
    options: Mapping[str, Any]
    held_out: int = 60


@dataclass(frozen=True)
class Setting:
    """What all parts share in one run."""

    data: Path
    quick: bool
    tokens: Callable[[str], int]

    def held_out(self, full: int) -> int:
        return 8 if self.quick else full


def _styles(*names: str, held_out: int) -> Callable[[Setting, int], panacea_data.Study]:
    return lambda setting, seed: panacea_data.made_styles(
        names, train=200, held_out=setting.held_out(held_out), seed=seed
    )


def _pairs(setting: Setting, seed: int) -> panacea_data.Study:
    return panacea_data.made_pairs(train=200, held_out=setting.held_out(40), seed=seed)


def _real(setting: Setting, seed: int) -> panacea_data.Study | None:
    return panacea_data.brief_verbose(
        setting.data, setting.tokens, "sft", held_out=setting.held_out(48), seed=seed
    )


# As ports of the paper train it: normal factors, alpha 512 over rank 8, learning rate 2e-3, cosine.
FAITHFUL: Mapping[str, Any] = MappingProxyType(
    {"init": "normal", "rank": 8, "learning_rate": 2e-3, "lr_scheduler_type": "cosine", "warmup_steps": 3}
)
PARTS: Mapping[str, Part] = MappingProxyType(
    {
        "styles": Part(
            _styles("concise", "formal", held_out=60),
            ALL,
            {"max_steps": 60, "per_device_train_batch_size": 8},
        ),
        "three": Part(
            _styles("concise", "formal", "casual", held_out=40),
            ("panacea", "experts"),
            {"max_steps": 60, "per_device_train_batch_size": 6},
        ),
        "pairs": Part(
            _pairs,
            ("panacea", "experts", "scale_at_0"),
            {"max_steps": 60, "per_device_train_batch_size": 6, "objective": "dpo"},
        ),
        "real": Part(
            _real,
            ("panacea", "experts", "joint", "scale_at_0"),
            {"max_steps": 60, "per_device_train_batch_size": 4},
        ),
    }
)


def main(argv: Sequence[str] | None = None) -> Result:
    """Run or read all cells, and put them together."""
    argv = sys.argv[1:] if argv is None else argv
    options = _arguments().parse_args(argv)
    torch.set_num_threads(options.threads)
    cells, run = Cells(options.resume), _Run(options)
    seeds = 1 if options.quick else options.seeds
    found: dict[str, list[dict[str, Any]]] = {}
    notes: list[str] = []
    for name in options.part or PARTS:
        for seed in range(seeds):
            cell = cells.run(f"{name}-{run.key(name)}-{seed}", lambda n=name, s=seed: run.study(n, s, cells))
            if cell["methods"]:
                found.setdefault(name, []).append(cell)
            elif not seed:
                notes.append(f"{name}: its data is not in {options.data.name}, so it was left out.")
    bars, tables, more = summarise(found)
    return harness.conclude(
        "panacea",
        argv,
        options,
        bars=bars,
        tables=tables,
        notes=[*notes, *more],
        versions=harness.versions("moocore"),
        cells=cells,
    )


class _Run:
    """Trains and evaluates; the model is loaded when the first cell needs it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._model: LanguageModel | None = None

    def key(self, name: str) -> str:
        """What the numbers of a part depend on."""
        made = self._fields(PARTS[name])
        return f"s{made['max_steps']}x{made['per_device_train_batch_size']}{'-quick' * self._options.quick}"

    def study(self, name: str, seed: int, cells: Cells) -> dict[str, Any]:
        """One part at one seed: a cell of what every method gave, each stored on its own on the way."""
        part = PARTS[name]
        setting = Setting(self._options.data, self._options.quick, self._count)
        study = part.make(setting, seed)
        if study is None:
            return {"methods": {}}
        options = PanaceaConfig(dimensions=study.dimensions, seed=seed, **self._fields(part))
        methods: dict[str, Any] = {}
        for kind in part.kinds:
            print(f"{name}, seed {seed}: {kind}", file=sys.stderr, flush=True)
            made = cells.run(
                f"{name}-{self.key(name)}-{seed}-{kind}", lambda k=kind: self._method(k, study, options)
            )
            methods |= made
        base = Base(study, self._score(), options.beta)
        return {
            "dimensions": list(study.dimensions),
            "objective": study.objective,
            "base": base.scores.as_dict(),
            "examples": {side: len(panacea_data.prompts(rows)) for side, rows in _sides(study).items()},
            "methods": methods,
        }

    def _method(self, kind: str, study: panacea_data.Study, options: PanaceaConfig) -> dict[str, Any]:
        score = self._score()
        base = Base(study, score, options.beta)
        fit = Fit(self._loaded(), study, options, score, 2 if self._options.quick else None)
        found = {}
        for name, method in KINDS[kind](fit).items():
            scores = evaluate(method.policy, method.preferences, study, base)
            account = {each: getattr(method, each) for each in ("runs", "steps", "tokens", "seconds")}
            found[name] = {**account, "scores": scores.as_dict()}
        return found

    def _fields(self, part: Part) -> dict[str, Any]:
        shorter = {"max_steps": 4, "per_device_train_batch_size": 2} if self._options.quick else {}
        return {**FAITHFUL, **part.options, **shorter}

    def _score(self) -> Scorer:
        return Scorer(self._loaded(), batch=32)

    def _count(self, text: str) -> int:
        return len(self._loaded().tokenizer(text, add_special_tokens=False)["input_ids"])

    def _loaded(self) -> LanguageModel:
        if self._model is None:
            self._model = LanguageModel.from_pretrained("smollm2-135m", device="cpu", dtype="bfloat16")
        return self._model


def _sides(study: panacea_data.Study) -> dict[str, panacea_data.Examples]:
    return {"train": study.train, "held out": study.held_out}


def _arguments() -> argparse.ArgumentParser:
    parser = harness.arguments("panacea", __doc__ or "")
    parser.set_defaults(seeds=3)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), metavar="DIR")
    parser.add_argument("--part", nargs="+", choices=list(PARTS), help="only these")
    return parser


if __name__ == "__main__":
    main()
