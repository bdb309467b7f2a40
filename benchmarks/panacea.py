"""Panacea against what it is compared with, on equal total compute: fronts, calibration, controls.

    python -m benchmarks.panacea [--quick] [--json FILE] [--data DIR] [--resume DIR] [--part NAME ...]

| part   | data                                                 | objective | methods                        |
|--------|------------------------------------------------------|-----------|--------------------------------|
| styles | rule-made answers, concise and formal                | SFT       | all of `panacea_methods`       |
| three  | the same with casual; one seed                       | SFT       | panacea, soups, oracle         |
| pairs  | rule-made pairs that brief and formal label opposite | DPO       | panacea, soups, s at 0         |
| real   | shorter and longer responses to real prompts         | SFT       | panacea, soups, oracle         |

Soups bring the mixture of their experts with them. Prompts are split once; seeds are those of the adapters
and of the λ drawn, one for what is in `ONCE`. Base model: SmolLM2-135M in bfloat16; what is trained is
float32, and so is each low-rank update that is evaluated. `panacea_methods` says how compute is counted,
`panacea_report` what must hold, `panacea_stats` what the reference point and the intervals are. Data for
"real" is not part of the project; see the README of the data folder.
"""

import argparse
import hashlib
import json
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
from persona_sdk.adapters.panacea_config import PanaceaConfig
from persona_sdk.models import LanguageModel

ALL = tuple(KINDS)
# One seed: controls, whose answer is not a matter of seeds, and the oracle, which fixes the reference point.
ONCE = ("oracle", "one_per_vector", "joint", "prompted", "scale_at_0")
SMOKE = ("panacea", "published", "experts", "oracle", "scale_at_0")  # what a smoke run has: bars need them


@dataclass(frozen=True)
class Setting:
    """What all parts share in one run."""

    data: Path
    quick: bool
    tokens: Callable[[str], int]

    def held_out(self, full: int) -> int:
        return 6 if self.quick else full

    def train(self, full: int) -> int:
        """DPO reads the reference of every training pair before it starts."""
        return 24 if self.quick else full


@dataclass(frozen=True)
class Part:
    """One study: its data, how adapters are trained on it, and which methods take part.

    Args:
        make: the data.
        kinds: keys of `KINDS`.
        options: of every method.
        ours: what panacea changes of them; see `panacea_methods`.
        seeds: at most so many.
    """

    make: Callable[[Setting], panacea_data.Study | None]
    kinds: tuple[str, ...]
    options: Mapping[str, Any]
    ours: Mapping[str, Any]
    seeds: int | None = None


def _styles(*names: str, held_out: int) -> Callable[[Setting], panacea_data.Study]:
    return lambda setting: panacea_data.made_styles(
        names, train=setting.train(200), held_out=setting.held_out(held_out)
    )


def _pairs(setting: Setting) -> panacea_data.Study:
    return panacea_data.made_pairs(train=setting.train(200), held_out=setting.held_out(30))


def _real(setting: Setting) -> panacea_data.Study | None:
    return panacea_data.brief_verbose(setting.data, setting.tokens, "sft", held_out=setting.held_out(40))


# As ports of the paper train it: normal factors, alpha 512 over rank 8, learning rate 2e-3, cosine.
PUBLISHED: Mapping[str, Any] = MappingProxyType(
    {"init": "normal", "rank": 8, "learning_rate": 2e-3, "lr_scheduler_type": "cosine", "warmup_steps": 3}
)
SAMPLED: Mapping[str, Any] = MappingProxyType({"preference_sampling": "example", "sampled_objective": True})
# The margin of an affine update grows evenly with λ. Vertices, whose margin has no end, make it too steep in
# between: there are fewer of them, and fewer weights near them.
FEWER_VERTICES: Mapping[str, Any] = MappingProxyType(
    {"preference_sampling": "example", "concentration": 1.5, "vertex_probability": 0.05}
)
PARTS: Mapping[str, Part] = MappingProxyType(
    {
        "styles": Part(
            _styles("concise", "formal", held_out=60),
            ALL,
            {"max_steps": 60, "per_device_train_batch_size": 8},
            SAMPLED,
        ),
        "pairs": Part(
            _pairs,
            ("panacea", "experts", "scale_at_0"),
            {"max_steps": 60, "per_device_train_batch_size": 6, "objective": "dpo"},
            FEWER_VERTICES,
        ),
        "real": Part(
            _real,
            ("panacea", "experts", "oracle"),
            {"max_steps": 50, "per_device_train_batch_size": 4},
            SAMPLED,
        ),
        "three": Part(
            _styles("concise", "formal", "casual", held_out=30),
            ("panacea", "experts", "oracle"),
            {"max_steps": 60, "per_device_train_batch_size": 6},
            SAMPLED,
            seeds=1,
        ),
    }
)


def main(argv: Sequence[str] | None = None) -> Result:
    """Run or read all cells, and put them together."""
    argv = sys.argv[1:] if argv is None else argv
    options = _arguments().parse_args(argv)
    torch.set_num_threads(options.threads)
    cells, run = Cells(options.resume), _Run(options)
    found: dict[str, list[dict[str, Any]]] = {}
    notes: list[str] = []
    for name in options.part or PARTS:
        seeds = 1 if options.quick else min(options.seeds, PARTS[name].seeds or options.seeds)
        made = [run.study(name, seed, cells) for seed in range(seeds)]
        if all(made):
            found[name] = [{**cell, "methods": {**made[0]["methods"], **cell["methods"]}} for cell in made]
        else:
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
        self._studies: dict[str, panacea_data.Study | None] = {}
        self._bases: dict[str, Base] = {}

    def study(self, name: str, seed: int, cells: Cells) -> dict[str, Any]:
        """What every method gave on one part at one seed; empty without the data."""
        study = self._study(name)
        if study is None:
            return {}
        part = PARTS[name]
        options = PanaceaConfig(dimensions=study.dimensions, seed=seed, **self._fields(part))
        methods: dict[str, Any] = {}
        digest = self._digest(study, options, part)
        for kind in part.kinds:
            if (kind in ONCE and seed) or (self._options.quick and kind not in SMOKE):
                continue
            print(f"{name}, seed {seed}: {kind}", file=sys.stderr, flush=True)
            key = f"{name}-{kind}-{seed}-{digest}"
            methods |= cells.run(key, lambda k=kind: self._method(k, name, study, options))
        base = cells.run(f"{name}-base-{digest}", lambda: self._base(name, study, options).scores.as_dict())
        return {
            "dimensions": list(study.dimensions),
            "objective": study.objective,
            "base": base,
            "prompts": {"train": _count(study.train), "held out": _count(study.held_out)},
            "methods": methods,
        }

    def _study(self, name: str) -> panacea_data.Study | None:
        if name not in self._studies:
            setting = Setting(self._options.data, self._options.quick, self._tokens)
            self._studies[name] = PARTS[name].make(setting)
        return self._studies[name]

    def _digest(self, study: panacea_data.Study, options: PanaceaConfig, part: Part) -> str:
        """What the numbers depend on, but for seed and kind, which names say."""
        fields = [self._fields(part), dict(part.ours), options.beta]
        facts = [*fields, study.train, study.held_out, self._divisions(study)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:10]

    def _base(self, name: str, study: panacea_data.Study, options: PanaceaConfig) -> Base:
        if name not in self._bases:
            self._bases[name] = Base(study, self._score(), options.beta)
        return self._bases[name]

    def _method(
        self, kind: str, name: str, study: panacea_data.Study, options: PanaceaConfig
    ) -> dict[str, Any]:
        base = self._base(name, study, options)
        fit = Fit(self._loaded(), study, options, self._score(), self._divisions(study), PARTS[name].ours)
        found = {}
        for title, method in KINDS[kind](fit).items():
            scores = evaluate(method.policy, method.preferences, study, base)
            account = {each: getattr(method, each) for each in ("runs", "steps", "tokens", "seconds")}
            found[title] = {**account, "scores": scores.as_dict()}
        return found

    def _fields(self, part: Part) -> dict[str, Any]:
        shorter = {"max_steps": 2, "per_device_train_batch_size": 2} if self._options.quick else {}
        return {**PUBLISHED, **part.options, **shorter}

    def _divisions(self, study: panacea_data.Study) -> int | None:
        """Of the grid of preferences; a smoke run needs a point between vertex and centre."""
        return (4 if len(study.dimensions) == 2 else 2) if self._options.quick else None

    def _score(self) -> Scorer:
        return Scorer(self._loaded(), batch=32)

    def _tokens(self, text: str) -> int:
        return len(self._loaded().tokenizer(text, add_special_tokens=False)["input_ids"])

    def _loaded(self) -> LanguageModel:
        if self._model is None:
            self._model = LanguageModel.from_pretrained("smollm2-135m", device="cpu", dtype="bfloat16")
        return self._model


def _count(examples: panacea_data.Examples) -> int:
    return len(panacea_data.prompts(examples))


def _arguments() -> argparse.ArgumentParser:
    parser = harness.arguments("panacea", __doc__ or "")
    parser.set_defaults(seeds=3)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), metavar="DIR")
    parser.add_argument("--part", nargs="+", choices=list(PARTS), help="only these")
    return parser


if __name__ == "__main__":
    main()
