"""Rule-made answers in several styles to the same questions, for studies with a known optimum.

    concise   "Only Paris."
    detailed  "It is Paris, the seat of the government."
    formal    "The answer to your question is Paris."
    casual    "Oh, that's Paris, you know!"

A style is told from one answer: the openings of two styles differ, so with the models p_i of the styles the
mixture Σ_i λ_i p_i costs -log λ_i nats a sequence over p_i, and no policy does better for every λ. Within a
style an answer is drawn from a few wordings, so that no style is a constant string.

Pairs for DPO carry opposite labels for "brief" and "formal": one answer is brief and casual, the other long
and formal. The optimum of the linear aggregation then has the margin logit(λ). A share of the pairs may agree
instead (brief and formal against long and casual); on those the dimensions do not conflict.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

STYLES: Mapping[str, tuple[str, ...]] = {
    "concise": ("{A}.", "Just {a}.", "Only {a}."),
    "detailed": ("It is {a}, {more}.", "This is {a}, {more}."),
    "formal": (
        "The answer to your question is {a}.",
        "Allow me to reply that it is {a}.",
        "I would respectfully say {a}.",
    ),
    "casual": ("Oh, that's {a}, you know!", "Easy one, it's {a}!", "Hey, {a} of course!"),
}
_PAIRED: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("brief", "casual"): ("It's {a}!", "That's {a}!"),
    ("brief", "formal"): ("One says {a}.", "It would be {a}."),
    ("long", "casual"): ("Oh, easy one, it's {a}, you know, {more}!", "Hey, that's {a} of course, {more}!"),
    ("long", "formal"): (
        "The answer to your question is {a}, {more}.",
        "Allow me to reply that it is {a}, {more}.",
    ),
}
BRIEF_AND_FORMAL = ("brief", "formal")

# Two questions, two additions of the detailed styles, and words with their answers.
_RELATIONS: tuple[tuple[tuple[str, str], tuple[str, str], str], ...] = (
    (
        ("What is the capital of {}?", "Which city governs {}?"),
        ("the seat of the government", "a city with a long history"),
        "France Paris, Spain Madrid, Italy Rome, Japan Tokyo, Egypt Cairo, Norway Oslo, Cuba Havana, Peru "
        "Lima, Greece Athens, Austria Vienna, Poland Warsaw, Ireland Dublin, Portugal Lisbon, Russia "
        "Moscow, Germany Berlin, Sweden Stockholm, Finland Helsinki, Hungary Budapest, Kenya Nairobi, "
        "China Beijing, Denmark Copenhagen, Belgium Brussels, Canada Ottawa, Chile Santiago, Iran Tehran, "
        "Iraq Baghdad",
    ),
    (
        ("Which continent is {} in?", "Where on the globe is {}?"),
        ("a part of the world with many nations", "one of the large land masses"),
        "Brazil America, Mexico America, Bolivia America, Uruguay America, Ecuador America, Vietnam Asia, "
        "Thailand Asia, Mongolia Asia, Nepal Asia, India Asia, Ghana Africa, Nigeria Africa, Morocco "
        "Africa, Angola Africa, Zambia Africa, Croatia Europe, Serbia Europe, Latvia Europe, Estonia "
        "Europe, Romania Europe, Algeria Africa, Korea Asia, Malaysia Asia, Albania Europe, Panama "
        "America",
    ),
    (
        ("What colour is {}?", "Which colour does {} have?"),
        ("a colour that is easy to see", "as every child has learned"),
        "grass green, snow white, coal black, blood red, gold yellow, chocolate brown, milk white, "
        "spinach green, ink blue, ketchup red, mustard yellow, soot black, ash grey, ivory white, emerald "
        "green, ruby red, coffee brown, sulphur yellow, asphalt black, lettuce green, salt white, cement "
        "grey, butter yellow",
    ),
    (
        ("What is a young {} called?", "How do people call the baby of a {}?"),
        ("a name that farmers use as well", "as any book on animals says"),
        "dog puppy, cat kitten, cow calf, horse foal, sheep lamb, goat kid, pig piglet, duck duckling, "
        "bear cub, deer fawn, hen chick, goose gosling, swan cygnet, frog tadpole, eagle eaglet, owl "
        "owlet, lion cub, kangaroo joey, hare leveret, seal pup, wolf pup, elephant calf, spider "
        "spiderling, fish fry",
    ),
    (
        ("What is the opposite of {}?", "Which word means the reverse of {}?"),
        ("a word from everyday speech", "its exact counterpart in meaning"),
        "hot cold, big small, fast slow, light dark, early late, rich poor, wet dry, strong weak, full "
        "empty, loud quiet, young old, hard soft, high low, near far, deep shallow, clean dirty, happy "
        "sad, sweet sour, thick thin, wide narrow, sharp blunt, open closed, brave afraid, rough smooth, "
        "heavy light, cheap dear",
    ),
    (
        ("Where does a {} work?", "In which place is a {} found at work?"),
        ("where the work of the day is done", "a place that such people know well"),
        "teacher school, doctor hospital, judge court, farmer farm, baker bakery, pilot cockpit, chef "
        "kitchen, miner mine, sailor ship, librarian library, actor theatre, banker bank, monk monastery, "
        "tailor workshop, waiter restaurant, gardener garden, soldier army, priest church, scientist "
        "laboratory, painter studio, barber salon, clerk office, butcher shop, mechanic garage",
    ),
    (
        ("What does one do with a {}?", "What is a {} made for?"),
        ("the task that it was made for", "a job done by hand for ages"),
        "knife cutting, pen writing, broom sweeping, needle sewing, oven baking, saw sawing, shovel "
        "digging, brush painting, bed sleeping, chair sitting, book reading, ladder climbing, kettle "
        "boiling, lamp lighting, soap washing, drum drumming, boat sailing, rod fishing, bow shooting, "
        "scale weighing, flute playing, clock timing, lens looking, rope tying, towel drying",
    ),
)


def questions(*, train: int = 200, held_out: int = 60, seed: int = 0) -> tuple[list[dict[str, str]], ...]:
    """Questions to train on and others about other things; each with its answer and what may be added.

    The split is by fact: both wordings of a question, and so its answer, are on one side.
    """
    draw = random.Random(seed)
    facts = [
        (asked, added, *entry.strip().rsplit(" ", 1))
        for asked, added, words in _RELATIONS
        for entry in words.split(",")
    ]
    draw.shuffle(facts)
    kept = [
        _question(draw.choice(asked), added, word, answer, draw)
        for asked, added, word, answer in facts[:held_out]
    ]
    seen = [
        _question(text, added, word, answer, draw)
        for asked, added, word, answer in facts[held_out:]
        for text in asked
    ]
    draw.shuffle(seen)
    if len(kept) < held_out or len(seen) < train:
        raise ValueError(f"{len(facts)} facts cannot give {train} and {held_out} questions.")
    return seen[:train], kept


def styled(
    asked: Sequence[Mapping[str, str]], styles: Sequence[str], seed: int = 0
) -> dict[str, list[dict[str, str]]]:
    """Prompts with an answer by style; example j is about the same question in every style."""
    draw = random.Random(seed)
    return {
        style: [{"prompt": q["prompt"], "completion": _word(draw, STYLES[style], q)} for q in asked]
        for style in styles
    }


def opposed_pairs(
    asked: Sequence[Mapping[str, str]], *, agreeing: float = 0.0, seed: int = 0
) -> list[dict[str, Any]]:
    """Labelled pairs for brief and formal, in the form of `persona_sdk.adapters.preference_data`.

    Args:
        asked: the questions.
        agreeing: share of the pairs on which both labels name the same response.
        seed: of the wordings and of the order of the two responses.
    """
    draw, found = random.Random(seed), []
    for question in asked:
        agree = draw.random() < agreeing
        brief = _word(draw, _PAIRED["brief", "formal" if agree else "casual"], question)
        long = _word(draw, _PAIRED["long", "casual" if agree else "formal"], question)
        place = draw.randrange(2)  # of the brief one
        found.append(
            {
                "prompt": question["prompt"],
                "response_0": (brief, long)[place],
                "response_1": (long, brief)[place],
                "better": {"brief": place, "formal": place if agree else 1 - place},
            }
        )
    return found


def _question(text: str, added: Sequence[str], word: str, answer: str, draw: random.Random) -> dict[str, str]:
    return {"prompt": text.format(word), "about": word, "answer": answer, "more": draw.choice(added)}


def _word(draw: random.Random, wordings: Sequence[str], question: Mapping[str, str]) -> str:
    answer = question["answer"]
    return draw.choice(wordings).format(a=answer, A=answer[0].upper() + answer[1:], more=question["more"])
