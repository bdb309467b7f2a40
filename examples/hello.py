"""Ten lines: remember, chat, explain, forget. The README's first example."""

from persona_sdk import PersonaModel

model = PersonaModel.from_pretrained("smollm2-135m", store="personas/")
alice = model.persona("alice-example")
alice.remember("Alice has a greyhound called Biscuit.")
reply = alice.chat("What is my dog called?", max_new_tokens=30)
print(reply)
print(alice.explain(reply))
print(alice.forget_everything().sha256)
