"""Persona SDK: one frozen language model, a different one for every user.

    from persona_sdk import PersonaModel

    model = PersonaModel.from_pretrained("smollm2-135m", store="personas/")
    alice = model.persona("alice", groups=["nurses"])
    alice.remember("Prefers metric units and short answers.")
    print(alice.chat("How warm is 80 F?"))

Importing this package loads neither torch nor a model; they come when they are first needed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from persona_sdk.errors import PersonaError

if TYPE_CHECKING:
    from persona_sdk.adapters.lora import LoRA, LoRAConfig
    from persona_sdk.adapters.panacea import Panacea
    from persona_sdk.adapters.panacea_config import PanaceaConfig
    from persona_sdk.compose import ChatOptions
    from persona_sdk.memory import MemCube, MemoryStore, Passage, Receipt, Revision
    from persona_sdk.model import PersonaModel
    from persona_sdk.models import LanguageModel
    from persona_sdk.persona import Persona
    from persona_sdk.plan import CompositionPlan
    from persona_sdk.reply import Explanation, Reply, ReplyStream

__version__ = "0.1.0"

_HOMES = {
    "ChatOptions": "compose",
    "CompositionPlan": "plan",
    "Explanation": "reply",
    "LanguageModel": "models",
    "LoRA": "adapters.lora",
    "LoRAConfig": "adapters.lora",
    "MemCube": "memory",
    "MemoryStore": "memory",
    "Panacea": "adapters.panacea",
    "PanaceaConfig": "adapters.panacea_config",
    "Passage": "memory",
    "Persona": "persona",
    "PersonaModel": "model",
    "Receipt": "memory",
    "Reply": "reply",
    "ReplyStream": "reply",
    "Revision": "memory",
}

__all__ = [
    "ChatOptions",
    "CompositionPlan",
    "Explanation",
    "LanguageModel",
    "LoRA",
    "LoRAConfig",
    "MemCube",
    "MemoryStore",
    "Panacea",
    "PanaceaConfig",
    "Passage",
    "Persona",
    "PersonaError",
    "PersonaModel",
    "Receipt",
    "Reply",
    "ReplyStream",
    "Revision",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'persona_sdk' has no attribute {name!r}")
    value = getattr(import_module(f"persona_sdk.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
