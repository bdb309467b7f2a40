"""Made cells of the panacea benchmark, as `benchmarks.panacea` would give them to its report."""

import numpy as np

from benchmarks.panacea_scores import Scores
from persona_sdk.adapters.preferences import grid

SFT = (
    "panacea",
    "as published",
    "rewarded soups",
    "mixture of the experts",
    "oracle",
    "one per vector",
    "joint",
    "λ in the prompt",
    "scale at 0",
)
DPO = ("panacea", "rewarded soups", "scale at 0")
ONCE = ("oracle", "one per vector", "joint", "λ in the prompt", "scale at 0")
PROMPTS = 20


def logits(preferences):
    first = np.clip(preferences[:, 0], 1e-4, 1 - 1e-4)
    return np.log(first) - np.log1p(-first)


def front(method, preferences, objective):
    """ξ less its best, or margins of the first dimension, that are believable for a method."""
    m = preferences.shape[1]
    centre = np.full_like(preferences, 1 / m)
    if objective == "dpo":
        steep = {"panacea": 1.1, "rewarded soups": 0.5, "scale at 0": 0.0}[method]
        return steep * logits(preferences)
    blind = method in ("joint", "scale at 0")
    made = np.log(np.clip(centre if blind else preferences, 3e-5, 1))
    if method == "rewarded soups":
        made = -6 * (1 - preferences) ** 2
    lost = {"panacea": 0.05, "as published": 0.2, "λ in the prompt": 0.6, "one per vector": 0.3}
    return made - lost.get(method, 0.0)


def method(name, objective, m, best, seed, change=None):
    """One method's entry; `change` maps (preferences, front) to another front."""
    preferences = grid(m).double().numpy()
    if name == "one per vector":
        preferences = np.concatenate([np.eye(m), np.full((1, m), 1 / m)])
    made = front(name, preferences, objective)
    made = made if change is None else change(preferences, made)
    shared = np.random.default_rng(7).normal(size=(PROMPTS, m))  # the same prompts are hard for all methods
    own = np.random.default_rng([seed, len(name)]).normal(size=(PROMPTS, m)) * 0.05
    noise = shared + own if objective == "sft" else own
    noise = noise - noise.mean(axis=0)
    if objective == "sft":
        scores = Scores(preferences, (made + best)[:, None, :] + noise[None])
    else:
        margin = made[:, None] + noise[None, :, 0]
        margins = np.stack([margin, -margin], axis=2)
        scores = Scores(preferences, -np.logaddexp(0.0, -margins), margins)
    return {"runs": 1, "steps": 60, "tokens": 37000 + seed, "seconds": 100.0, "scores": scores.as_dict()}


def cells(
    objective, *, seeds=1, names=("concise", "formal"), vertices=(-4.0, -3.0), kinds=None, changes=None
):
    """Cells of a part, one a seed. `changes`: method -> a function of preferences, front and seed."""
    kinds = kinds or (SFT if objective == "sft" else DPO)
    m, best, found = len(names), np.array(vertices), []
    for seed in range(seeds):
        methods = {}
        for kind in kinds:
            if kind in ONCE and found:
                methods[kind] = found[0]["methods"][kind]
                continue
            change = (changes or {}).get(kind)
            moved = None if change is None else (lambda p, f, c=change, s=seed: c(p, f, s))
            methods[kind] = method(kind, objective, m, best, seed, moved)
        far = best - 20 if objective == "sft" else np.full(m, -np.log(2))
        base = Scores(np.full((1, m), 1 / m), np.broadcast_to(far, (1, PROMPTS, m)).copy())
        prompts = {"train": 200, "held out": PROMPTS}
        about = {"dimensions": list(names), "objective": objective, "prompts": prompts}
        found.append({**about, "base": base.as_dict(), "methods": methods})
    return found
