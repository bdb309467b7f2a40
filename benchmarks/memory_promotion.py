"""Text to weights: what an adapter distilled from a persona's facts recalls, and what it costs elsewhere.

made facts       "My favourite fruit is papaya.": questions not drilled, wrong ends of the same category
stored facts     "The user lives in Lyon since May 2024.": the same, as the writer of the memory stores it
persona          sentences of Synthetic-Persona-Chat, wrong ends that the base model itself would say
recall           share of questions whose right end is likelier than the wrong ones (4 ends, chance 0.25)
said             share of greedy answers that hold the value
ability          mean log-likelihood a token of unrelated answers, and unrelated questions chosen right

Every row is measured for the base alone, with the texts in the prompt, and with the adapter instead of them.
"""

import csv
import gzip
import random
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from benchmarks.harness import Bar, Row
from benchmarks.memory import Part, Run
from benchmarks.subjects import smollm2
from persona_sdk.adapters.distillation import DistillationConfig, distil, greedy
from persona_sdk.adapters.gate import Gate, Scores, guesses, score
from persona_sdk.adapters.probes import HELD_OUT, Probe, probes_of
from persona_sdk.adapters.statements import Fact, statement_of
from persona_sdk.adapters.twin import applied, twin
from persona_sdk.memory.extraction import RuleExtractor
from persona_sdk.memory.statement import Turn
from persona_sdk.models import LanguageModel
from persona_sdk.prompting import Message, encode, with_passages
from persona_sdk.tensors import TensorBundle, size_bytes

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
SAID: dict[str, tuple[str, ...]] = {
    "I moved to {} in May 2024.": ("Lyon", "Oslo", "Lisbon", "Chicago", "Osaka", "Dublin"),
    "I have a dog called {}.": ("Biscuit", "Rex", "Max", "Bella", "Luna", "Charlie"),
    "I hate {}.": ("cilantro", "olives", "garlic", "mushrooms", "onions", "liver"),
    "I'm a {}.": ("nurse", "teacher", "plumber", "farmer", "baker", "pilot"),
    "I work for {}.": ("Siemens", "Nokia", "Toyota", "Boeing", "Nestle", "Lego"),
    "My sister is called {}.": ("Ingrid", "Paula", "Maria", "Sofia", "Helen", "Ruth"),
    "My favourite colour is {}.": ("turquoise", "green", "orange", "purple", "yellow", "grey"),
    "I speak {}.": ("Finnish", "Spanish", "German", "Korean", "Polish", "Arabic"),
    "I love {}.": ("rowing", "chess", "sailing", "knitting", "opera", "jazz"),
    "I drive a {}.": ("Volvo", "Fiat", "Honda", "Ford", "Jeep", "Toyota"),
    "I'm learning {}.": ("Welsh", "Greek", "Hindi", "Turkish", "Dutch", "Czech"),
    "I no longer eat {}.": ("meat", "sugar", "cheese", "bread", "fish", "eggs"),
}
SAID_AT = datetime(2025, 3, 10, tzinfo=UTC)


def stored(sentence: str) -> Fact:
    """The statement that the memory's writer makes of a sentence, with attribute and value."""
    (found,) = RuleExtractor().extract([Turn("user", sentence, SAID_AT)]).statements
    return Fact(found.text, found.attribute, found.value)


def made_facts(
    seed: int,
    count: int,
    categories: Mapping[str, Sequence[str]] = CATEGORIES,
    make: Callable[[str], Fact] = Fact,
) -> tuple[list[Fact], list[Probe]]:
    """A persona's facts, and questions with wrong ends of the same category; the same seed gives the same."""
    draw = random.Random(seed)
    facts, probes = [], []
    for template in draw.sample(sorted(categories), count):
        values = draw.sample(categories[template], 4)
        right = draw.randrange(4)
        fact = make(template.format(values[right]))
        said = statement_of(fact)
        ends = tuple(statement_of(make(template.format(value))).value for value in values)
        facts.append(fact)
        probes += [Probe(each.format(question=said.question), said.stem, ends, right) for each in HELD_OUT]
    return facts, probes


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
    model: LanguageModel, facts: Sequence[str | Fact], probes: Sequence[Probe], options: DistillationConfig
) -> dict[str, Any]:
    """Distil the facts and measure base, prompt and adapter; as a cell."""
    adapter = distil(model, facts, options, progress=False)
    texts = [Fact.of(fact).text for fact in facts]
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
    size = size_bytes(adapter.tensors)
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
        for kind, categories, make in (("made", CATEGORIES, Fact), ("stored", SAID, stored)):
            run.tell(f"promotion: {kind} facts of persona {seed}")

            def one(seed: int = seed, categories: Any = categories, make: Any = make) -> dict[str, Any]:
                facts, probes = made_facts(seed, count, categories, make)
                return examine(model(), facts, probes, options)

            key = f"promotion-{kind}-facts-{count}-{_key(options)}-{seed}"
            cells[f"{kind} facts, persona {seed}"] = run.cells.run(key, one)
    notes = []
    texts = None if run.quick else persona_texts(run, 0, 4)
    if texts is not None:
        run.tell("promotion: a persona of the data")

        def real() -> dict[str, Any]:
            probes = probes_of(texts, rivals=guesses(twin(model())))
            return examine(model(), texts, probes, options)

        cells["sentences of the data"] = run.cells.run(f"promotion-data-facts-{_key(options)}", real)
    elif not run.quick:
        notes.append(f"Promotion: no synthetic_persona_chat in {run.data.name}; made facts only.")
    return summarise(cells, notes)


def summarise(cells: dict[str, dict[str, Any]], notes: Sequence[str] = ()) -> Part:
    """Bars and tables from cells."""
    gate = Gate()

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
    bars: dict[str, Bar] = {}
    for kind in ("made", "stored"):
        bars |= _bars(kind, [cell for name, cell in cells.items() if name.startswith(kind)])
    return Part(
        bars=bars,
        tables={"text to weights": rows, "text to weights: what it took": costs},
        notes=[
            *notes,
            "Promotion: held-out questions are the trained ones behind openings that were not trained; other "
            "wordings were not tried. The unrelated questions are short, as the anchors of the training are, "
            "twice of one form with them (a capital, a sum): likelier answers there show that short answers "
            "became likelier, not that the model got abler.",
            f"Promotion: the gate would accept {sum(accepted)} of {len(accepted)} adapters. Recall is "
            "a choice of four ends, chance 0.25; one small model and few personas.",
        ],
    )


def _bars(kind: str, cells: Sequence[dict[str, Any]]) -> dict[str, Bar]:
    """The same bars for facts of either kind."""

    def mean(side: str, field: str) -> float:
        return float(np.mean([cell["sides"][side][field] for cell in cells]))

    def gain(field: str, over: str = "base") -> float:
        return mean("adapter", field) - mean(over, field)

    named = {
        "recall of held-out questions": Bar.of(mean("adapter", "recall"), ">=", 0.8),
        "gain in recall over the base": Bar.of(gain("recall"), ">=", 0.4),
        "recall over that with the text in the prompt": Bar.of(
            gain("recall", "text in the prompt"), ">=", -0.1
        ),
        "change of unrelated answers, nats a token": Bar.of(gain("ability"), ">=", -0.25),
        "change of unrelated questions right": Bar.of(gain("choice"), ">=", -0.1),
    }
    return {f"promotion, {kind} facts: {name}": bar for name, bar in named.items()}


def _scores(side: dict[str, float]) -> Scores:
    return Scores(recall=side["recall"], ability=side["ability"], choice=side["choice"])


def _key(options: DistillationConfig) -> str:
    """What the numbers depend on, as part of a file name."""
    return f"r{options.rank}-e{options.num_train_epochs:g}-lr{options.learning_rate:g}-a{options.anchors}"
