"""One adapter, every preference: train two styles, give each user a mix, steer a reply, export one mix.

Runs on a tiny random model in seconds; with real models the calls are the same.
"""

import random
import tempfile
from pathlib import Path

from persona_sdk import LoRA, PersonaModel
from persona_sdk.adapters import Panacea
from persona_sdk.adapters.pareto import evaluate
from persona_sdk.adapters.preferences import grid
from persona_sdk.testing import tiny_language_model

PROMPT = "Is it warm?"
WORDS = ("hm", "HA")
# Every word is drawn anew: the style must come from the preference, not from the words before.
ODDS = {"calm": (4, 1), "loud": (1, 4)}
draw = random.Random(0)
DATA = {
    style: [(PROMPT, " ".join(draw.choices(WORDS, odds, k=12))) for _ in range(16)]
    for style, odds in ODDS.items()
}
OPTIONS = {"dimensions": tuple(DATA), "rank": 4, "max_steps": 200, "learning_rate": 1e-2}


def main() -> None:
    base = tiny_language_model(hidden=64)
    adapter = Panacea.train(base, DATA, OPTIONS)
    measured = evaluate(base, adapter, DATA, grid(2, divisions=4))
    print("Log-likelihood of the calm and the loud replies, by preference:")
    for preference, values in zip(measured.preferences.tolist(), measured.values.tolist(), strict=True):
        print("  calm {:.2f} loud {:.2f}: {:7.2f} {:7.2f}".format(*preference, *values))

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with PersonaModel.from_pretrained(base, store=folder / "store") as model:
            model.adapters.add("shared/style", adapter)
            people = {name: model.persona(name) for name in ("ann", "bob")}
            for loud, persona in enumerate(people.values()):
                persona.attach("shared/style")
                persona.prefer(loud=loud)
            print("One batch, one copy of the weights, a preference for every row:")
            asked = [(persona, PROMPT) for persona in people.values()]
            for reply in model.chat_batch(asked, max_new_tokens=12):
                print(f"  {reply.persona} {dict(reply.controls['shared/style'])}: {reply.text.strip()}")

            # much longer than needed, so that it is still being written when it is steered
            stream = people["ann"].stream(PROMPT, max_new_tokens=400, ignore_eos=True)
            next(stream)
            stream.steer(loud=1)
            tokens = stream.reply.tokens
            (steer,) = stream.reply.steers
            before, after = map(base.tokenizer.decode, (tokens[: steer.token], tokens[steer.token :]))
            print(f"Steered while it was written: {before[-12:]}|{after[:24]}")

        adapter.export_peft(folder / "half", preference={"calm": 0.5})
        plain = LoRA.from_pretrained(folder / "half", base=base)
        print(f"At calm 0.50 it is a plain LoRA of rank {plain.config.rank} for peft and vLLM.")


if __name__ == "__main__":
    main()
