"""Remember, chat, explain, forget: the shortest way through the library."""

from persona_sdk import PersonaModel

model = PersonaModel.from_pretrained("smollm2-135m", store="personas/")
carol = model.persona("carol")
carol.remember("Carol has a greyhound called Biscuit.")
reply = carol.chat("What kind of dog do I have?", max_new_tokens=30)
print(reply)
print(carol.explain(reply))
print(carol.forget_everything().cube_ids)
