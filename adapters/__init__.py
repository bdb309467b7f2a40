"""Adapter families: one file each, all with the four verbs of `persona_sdk.adapters.base`.

    family   what it learns                                          reduces to
    lora     a low-rank update of the base's linear maps             LowRankPatch
    panacea  one low-rank update for every preference vector         LowRankPatch, gated by the vector

Families are found by name through `persona_sdk.registry`, other packages' as well as these.
"""

if __name__ != "persona_sdk.adapters":
    raise ImportError(
        "Import this package as persona_sdk.adapters; 'adapters' would be a second copy of every class."
    )

from persona_sdk.adapters.base import (
    Adapter,
    AdapterRequest,
    ExportsPeft,
    LearnsOnline,
    State,
    Steerable,
    Update,
)
from persona_sdk.adapters.lora import LoRA, LoRAConfig
from persona_sdk.adapters.panacea import Panacea
from persona_sdk.adapters.panacea_config import PanaceaConfig

__all__ = [
    "Adapter",
    "AdapterRequest",
    "ExportsPeft",
    "LearnsOnline",
    "LoRA",
    "LoRAConfig",
    "Panacea",
    "PanaceaConfig",
    "State",
    "Steerable",
    "Update",
]
