"""What to learn from: questions about a text with their answers, its paraphrases, and unrelated prompts.

How a text is taken apart is said in `persona_sdk.adapters.statements`.
"""

from persona_sdk.adapters.statements import Fact, statement_of

TRAINING = ("{question}", "Do you remember? {question}", "Please tell me: {question}")

# Prompts that have nothing to do with anybody's memory. Those of `persona_sdk.adapters.gate` are others.
ANCHORS = (
    "What is the capital of Japan?",
    "Write one sentence about rain.",
    "How many days are in a week?",
    "Name a primary colour.",
    "What do bees make?",
    "Explain what a bridge is for.",
    "Translate 'good morning' into Spanish.",
    "What is 7 plus 5?",
    "Give me a tip for sleeping better.",
    "Who wrote Hamlet?",
    "What is ice made of?",
    "Suggest a name for a small shop.",
)


def training_pairs(text: str | Fact) -> list[tuple[str, str]]:
    """Questions about a text with their answer."""
    said = statement_of(text)
    return [(template.format(question=said.question), said.answer) for template in TRAINING]


def paraphrases(text: str | Fact) -> list[str]:
    """The text as it stands, and said to the user."""
    return list(dict.fromkeys([" ".join(Fact.of(text).text.split()), statement_of(text).answer]))
