"""Adapters come from peft and go back to peft: load two LoRA folders, use both in one row, export their sum.

Runs on a tiny random model in seconds; with real models the calls are the same.
"""

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from persona_sdk import CompositionPlan, LoRA
from persona_sdk.adapters import AdapterRequest, lowrank
from persona_sdk.engine import Engine, Request
from persona_sdk.testing import tiny_language_model

PROMPT = (5, 60, 99, 130)


def made_by_peft(folder: Path, rank: int) -> Path:
    config = LoraConfig(
        r=rank,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    get_peft_model(tiny_language_model().module, config).save_pretrained(folder)
    return folder


def logits_in_peft(folder: Path) -> torch.Tensor:
    served = PeftModel.from_pretrained(tiny_language_model().module, str(folder))
    with torch.inference_mode():
        return served(torch.tensor([PROMPT])).logits[0]


def logits_here(base, adapters: dict[str, LoRA]) -> torch.Tensor:
    made = [a.contribute({}, AdapterRequest(origin=name)) for name, a in adapters.items()]
    plan = CompositionPlan(base.fingerprint, tuple(part for c in made for part in c.parts))
    tensors = {digest: bundle for c in made for digest, bundle in c.tensors.items()}
    return Engine(base).logits([Request(prompt=PROMPT, plan=plan, tensors=tensors)])[0]


def main() -> None:
    base = tiny_language_model()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tone = LoRA.from_pretrained(made_by_peft(folder / "tone", rank=4), base=base)
        facts = LoRA.from_pretrained(made_by_peft(folder / "facts", rank=2), base=base)

        both = lowrank.concatenate([(tone.tensors, None), (facts.tensors, None)])
        LoRA.from_tensors(base.fingerprint, both).export_peft(folder / "both")

        difference = logits_here(base, {"tone": tone, "facts": facts}) - logits_in_peft(folder / "both")
    print(f"two adapters in one row against their sum in peft: off by {difference.abs().max():.0e} at most")

    smaller = lowrank.truncate_bundle(both, 4)
    print(f"the sum of rank 6 cut to rank 4 loses {smaller.relative_error:.1%} of its norm")


if __name__ == "__main__":
    main()
