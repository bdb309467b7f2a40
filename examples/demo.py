"""The main job, end to end: two users, one group, one heterogeneous batch, every answer explained.

    make demo          or          python examples/demo.py [--store FOLDER]

Runs on the embedded default models, on a CPU, without a key or a hub. What it makes stays in the store, so
a second run finds it there and goes straight to the batch.
"""

import argparse
import json
import time
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from persona_sdk import LoRA, LoRAConfig, Persona, PersonaModel

DATA = Path(__file__).parent / "data"
QUESTION = "Write two sentences about my perfect Saturday."
console = Console()


def lines(name: str) -> list[str]:
    return (DATA / name).read_text().splitlines()


def remember_facts(persona: Persona) -> None:
    facts = json.loads((DATA / "facts.json").read_text())[persona.id]
    if persona.memories():
        console.print(f"{persona.id} is in the store already, at revision {persona.revision}")
        return
    for cube in persona.remember_all(facts):
        console.print(f"{persona.id} remembers  [cyan]{cube.text}[/]  [dim]cube {cube.id[:8]}[/]")


def train_adapter(
    model: PersonaModel, owner: Persona, name: str, texts: list[str], *, steps: int, weight: float
) -> None:
    """Train a plain LoRA on an owner's texts and attach it; the texts become its provenance."""
    if name in model.adapters.names(owner.id):
        console.print(f"{name} is in the store already")
        return
    sources = owner.remember_all(texts, title=name, semantic_type="writing", searchable=False)
    config = LoRAConfig(
        rank=8, max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-3, max_length=64
    )
    started = time.monotonic()
    adapter = LoRA.train(model, texts, config, progress=True)
    owner.add_adapter(name.split("/")[1], adapter, sources=sources)
    owner.attach(name, weight=weight)
    console.print(f"trained {name} on {len(texts)} texts in {time.monotonic() - started:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", default="personas", help="folder of the store")
    parser.add_argument("--steps", type=int, default=40, help="training steps for alice's adapter")
    arguments = parser.parse_args()

    console.rule("1. one base model, one store")
    model = PersonaModel.from_pretrained("smollm2-135m", store=arguments.store)
    console.print(f"smollm2-135m, fingerprint {model.base.fingerprint[:12]}, store {arguments.store}/")

    console.rule("2. two users and a group")
    bookclub = model.group("bookclub")
    alice = model.persona("alice", groups=["bookclub"])
    bob = model.persona("bob")
    remember_facts(alice)
    remember_facts(bob)

    console.rule("3. adapters: alice's own voice, and one for her group")
    train_adapter(model, alice, "alice/voice", lines("shelley.txt"), steps=arguments.steps, weight=0.5)
    train_adapter(
        model, bookclub, "bookclub/gothic", lines("lovecraft.txt"), steps=arguments.steps // 2, weight=0.3
    )

    console.rule("4. one batch, three different models")
    started = time.monotonic()
    replies = model.chat_batch(
        [(None, QUESTION), (alice, QUESTION), (bob, QUESTION)], max_new_tokens=60, repetition_penalty=1.1
    )
    seconds = time.monotonic() - started
    tokens = sum(reply.usage.completion_tokens for reply in replies)
    console.print(f'"{QUESTION}"  {len(replies)} rows, {tokens} tokens in {seconds:.1f} s')
    for name, reply in zip(["base", "alice", "bob"], replies, strict=True):
        console.print(Panel(Text(reply.text), title=name, title_align="left"))

    console.rule("5. why")
    for persona, reply in zip([alice, bob], replies[1:], strict=True):
        console.print(persona.explain(reply))
        console.print()
    model.close()
    where = "" if arguments.store == "personas" else f" --store {arguments.store}"
    console.print(f"Go on talking:  [bold].venv/bin/persona chat --user alice{where}[/]")


if __name__ == "__main__":
    main()
