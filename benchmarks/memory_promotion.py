"""Text to weights: what an adapter distilled from a persona's facts recalls, and what it costs elsewhere.

made facts       "My favourite fruit is papaya.": questions not drilled, wrong ends of the same category
persona          sentences of Synthetic-Persona-Chat, wrong ends that the base model itself would say
recall           share of questions whose right end is likelier than the wrong ones (4 ends, chance 0.25)
said             share of greedy answers that hold the value
ability          mean log-likelihood a token of unrelated answers, and unrelated questions chosen right

Every row is measured for the base alone, with the texts in the prompt, and with the adapter instead of them.
"""

import csv
import gzip
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.harness import Bar, Row
from benchmarks.memory import Part, Run
from benchmarks.subjects import smollm2
from persona_sdk.adapters.distillation import DistillationConfig, distil, greedy
from persona_sdk.adapters.gate import Gate, Scores, guesses, score
from persona_sdk.adapters.probes import HELD_OUT, Probe, probes_of
from persona_sdk.adapters.statements import statement_of
from persona_sdk.adapters.twin import applied, twin
from persona_sdk.models import LanguageModel
from persona_sdk.prompting import Message, encode, with_passages
from persona_sdk.tensors import TensorBundle

ANSWER_TOKENS = 20
CATEGORIES: dict[str, tuple[str, ...]] = {
    "My favourite fruit is {}.": ("papaya", "quince", "mango", "plum", "cherry", "pear"),
    "My favourite colour is {}.": ("turquoise", "green", "orange", "purple", "yellow", "grey"),
    "My sister's name is {}.": ("Ingrid", "Paula", "Maria", "Sofia", "Helen", "Ruth"),
    "My dog's name is {}.": ("Biscuit", "Rex", "Max", "Bella", "Luna", "Charlie"),
    "I live in {}.": ("Lyon", "Oslo", "Lisbon", "Chicago", "Osaka", "Dublin"),
    "I play {}.": ("the cello", "the drums", "the flute", "the piano", "the violin", "the harp"),
    "I drive {}.": ("an old Volvo", "a red Fiat", "a black Audi", "a small Honda", "a white Ford", "a Jeep"),
    "I speak {}.": ("Finnish", "Spanish", "German", "Korean", "Polish", "Arabic"),
    "My job is {}.": ("beekeeping", "nursing", "teaching", "plumbing", "farming", "acting"),
    "My birthday is in {}.": ("February", "March", "June", "August", "October", "December"),
    "My allergy is {}.": ("hazelnuts", "pollen", "milk", "cats", "wheat", "shrimp"),
    "My favourite sport is {}.": ("rowing", "tennis", "football", "boxing", "hockey", "judo"),
}


def made_facts(seed: int, count: int) -> tuple[list[str], list[Probe]]:
    """A persona's facts, and questions with wrong ends of the same category; the same seed gives the same."""
    draw = random.Random(seed)
    texts, probes = [], []
    for template in draw.sample(sorted(CATEGORIES), count):
        values = draw.sample(CATEGORIES[template], 4)
        right = draw.randrange(4)
        text = template.format(values[right])
        said = statement_of(text)
        ends = tuple(statement_of(template.format(value)).value for value in values)
        texts.append(text)
        probes += [Probe(each.format(question=said.question), said.stem, ends, right) for each in HELD_OUT]
    return texts, probes


def persona_texts(run: Run, seed: int, count: int) -> list[str] | None:
    """First-person sentences of one persona of the data, or None without the data."""
    file = run.data / "synthetic_persona_chat" / "valid.csv.gz"
    if not file.exists():
        return None
    with gzip.open(file, "rt", newline="") as stream:
        rows = [row["user 1 personas"] for row in csv.DictReader(stream)]
    lines = random.Random(seed).choice(sorted({row for row in rows if len(row.splitlines()) >= count}))
    return [line.strip() for line in lines.splitlines() if line.strip()][:count]


def said(
    model: LanguageModel, probes: Sequence[Probe], known: Sequence[str], bundle: TensorBundle | None
) -> float:
    """Share of greedy answers that hold the right value."""
    hits = 0
    with applied(model, bundle):
        for probe in probes:
            turn = Message(role="user", content=probe.question)
            tokens = greedy(model, encode(model.tokenizer, with_passages([turn], known)), ANSWER_TOKENS)
            hits += probe.options[probe.right].casefold() in model.tokenizer.decode(tokens).casefold()
    return hits / len(probes)


def examine(
    model: LanguageModel, texts: Sequence[str], probes: Sequence[Probe], options: DistillationConfig
) -> dict[str, Any]:
    """Distil the texts and measure base, prompt and adapter; as a cell."""
    adapter = distil(model, texts, options, progress=False)
    own = twin(model)
    sides: dict[str, tuple[Sequence[str], TensorBundle | None]] = {
        "base": ((), None),
        "text in the prompt": (texts, None),
        "adapter": ((), adapter.tensors),
    }
    found: dict[str, Any] = {}
    for name, (known, bundle) in sides.items():
        scores = score(own, probes, bundle, known=known)
        found[name] = {**scores.model_dump(), "said": said(own, probes, known, bundle)}
    assert adapter.report is not None
    training = {
        "seconds": adapter.report.seconds,
        "tokens": adapter.report.tokens,
        "steps": adapter.report.steps,
    }
    size = sum(tensor.numel() * tensor.element_size() for tensor in adapter.tensors.values())
    return {"sides": found, "texts": len(texts), "questions": len(probes), "bytes": size, **training}


def measure(run: Run) -> Part:
    """Run or read all cells; see `benchmarks.memory`."""
    count, personas = (3, 1) if run.quick else (8, 3)
    options = DistillationConfig(num_train_epochs=5 if run.quick else 6, anchors=6 if run.quick else 12)
    loaded: list[tuple[LanguageModel, str]] = []

    def model() -> LanguageModel:
        if not loaded:
            loaded.append(smollm2())
        return loaded[0][0]

    cells: dict[str, dict[str, Any]] = {}
    for seed in range(personas * run.seeds):
        run.tell(f"promotion: made facts of persona {seed}")

        def made(seed: int = seed) -> dict[str, Any]:
            texts, probes = made_facts(seed, count)
            return examine(model(), texts, probes, options)

        name = f"made facts, persona {seed}"
        cells[name] = run.cells.run(f"promotion-made-{count}-{_key(options)}-{seed}", made)
    notes = []
    texts = None if run.quick else persona_texts(run, 0, 4)
    if texts is not None:
        run.tell("promotion: a persona of the data")

        def real() -> dict[str, Any]:
            probes = probes_of(texts, rivals=guesses(twin(model())))
            return examine(model(), texts, probes, options)

        cells["sentences of the data"] = run.cells.run(f"promotion-data-{_key(options)}", real)
    elif not run.quick:
        notes.append(f"Promotion: no synthetic_persona_chat in {run.data.name}; made facts only.")
    return summarise(cells, notes)


def summarise(cells: dict[str, dict[str, Any]], notes: Sequence[str] = ()) -> Part:
    """Bars and tables from cells."""
    made = [cell for name, cell in cells.items() if name.startswith("made")]
    gate = Gate()

    def gains(field: str) -> list[float]:
        return [cell["sides"]["adapter"][field] - cell["sides"]["base"][field] for cell in made]

    def mean(side: str, field: str) -> float:
        return float(np.mean([cell["sides"][side][field] for cell in made]))

    rows: list[Row] = [
        {
            "facts": name,
            "with": side,
            **{k: cell["sides"][side][k] for k in ("recall", "said", "ability", "choice")},
        }
        for name, cell in cells.items()
        for side in cell["sides"]
    ]
    costs: list[Row] = [
        {"facts": name, **{k: cell[k] for k in ("texts", "questions", "steps", "tokens", "seconds", "bytes")}}
        for name, cell in cells.items()
    ]
    accepted = [
        gate.judge(
            *(_scores(cell["sides"][side]) for side in ("base", "adapter")), cell["questions"]
        ).accepted
        for cell in cells.values()
    ]
    bars = {
        "promotion: recall of held-out questions": Bar.of(mean("adapter", "recall"), ">=", 0.8),
        "promotion: gain in recall over the base": Bar.of(float(np.mean(gains("recall"))), ">=", 0.4),
        "promotion: recall over that with the text in the prompt": Bar.of(
            mean("adapter", "recall") - mean("text in the prompt", "recall"), ">=", -0.1
        ),
        "promotion: change of unrelated answers, nats a token": Bar.of(
            float(np.mean(gains("ability"))), ">=", -0.25
        ),
        "promotion: change of unrelated questions right": Bar.of(float(np.mean(gains("choice"))), ">=", -0.1),
    }
    return Part(
        bars=bars,
        tables={"text to weights": rows, "text to weights: what it took": costs},
        notes=[
            *notes,
            f"Promotion: the gate would accept {sum(accepted)} of {len(accepted)} adapters. Recall is "
            "a choice of four ends, chance 0.25; one small model and few personas.",
        ],
    )


def _scores(side: dict[str, float]) -> Scores:
    return Scores(recall=side["recall"], ability=side["ability"], choice=side["choice"])


def _key(options: DistillationConfig) -> str:
    """What the numbers depend on, as part of a file name."""
    return f"r{options.rank}-e{options.num_train_epochs:g}-lr{options.learning_rate:g}-a{options.anchors}"
