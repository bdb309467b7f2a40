"""Compositions as one PEFT LoRA folder: exact, whole, the same bytes every time, the same tokens in peft."""

import copy
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel

from persona_sdk import CompositionPlan, LoRA, PersonaModel, materialize, registry
from persona_sdk.adapter_composition import AdapterComposition, Adjustment, compose_adapters
from persona_sdk.adapters import Adapter, peft_format
from persona_sdk.adapters.lora import LoRAConfig
from persona_sdk.compose import PINNED
from persona_sdk.engine import Engine, Request
from persona_sdk.errors import (
    AdapterError,
    CompositionError,
    IncompatibleAdapterError,
    InvalidInputError,
    NotFoundError,
)
from persona_sdk.materialize import low_rank_sum, sources_of, write, write_once
from persona_sdk.materialize import materialize as write_persona
from persona_sdk.memory import CubeDraft, CubeHeader
from persona_sdk.plan import Contribution, DecodingRule, LowRankPatch, PassageRef, Passages, SoftPrefix
from persona_sdk.tensors import PREFIX, digest, freeze, low_rank_bundle, low_rank_pairs
from persona_sdk.testing import HashEmbedder, tiny_language_model

from .adapters.support import PEFT_WARNINGS, peft_logits
from .engine.support import patch, random_factors

pytestmark = pytest.mark.filterwarnings(PEFT_WARNINGS)

ARCHITECTURES = ("llama", "gpt2", "qwen2", "gemma")
PROMPTS = ((5, 60, 99, 130), (1, 40, 77), (301, 55, 56, 57, 120, 90), (9,))
NEW = 24


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Tilting(Adapter):
    """A family with a preference, and with vectors in front if its state asks for them."""

    family: ClassVar[str] = "tilting"
    config_type: ClassVar[type[LoRAConfig]] = LoRAConfig

    @classmethod
    def train(cls, model: Any, data: Any, config: Any = None) -> Self:
        raise AssertionError("not used")

    def save_pretrained(self, folder: str | Path) -> Path:
        raise AssertionError("not used")

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, base: Any = None) -> Self:
        raise AssertionError("not used")

    def controls(self, state: Mapping[str, Any]) -> dict[str, float]:
        return {"concise": 1.0, "detailed": 1.0, **state.get("tilt", {})}

    def steered(self, state: Mapping[str, Any], controls: Mapping[str, float]) -> dict[str, Any]:
        return {**state, "tilt": {**self.controls(state), **controls}}

    def contribute(self, state: Mapping[str, Any], request: Any) -> Contribution:
        gate = tuple(request.weight * value for value in self.controls(state).values())
        parts = [LowRankPatch(factors=self.digest, rank=2, gate=gate, origin=request.origin)]
        tensors = {self.digest: self.tensors}
        if width := state.get("prefix"):
            vectors = freeze({PREFIX: torch.zeros(1, width)})
            parts.append(SoftPrefix(vectors=digest(vectors), length=1, origin=request.origin))
            tensors[digest(vectors)] = vectors
        return Contribution(tuple(parts), tensors)


@pytest.fixture(params=ARCHITECTURES)
def any_model(request, tmp_path) -> Iterator[PersonaModel]:
    base = tiny_language_model(architecture=request.param)
    with PersonaModel.from_pretrained(base, store=tmp_path / "store", embedder=HashEmbedder()) as opened:
        yield furnished(opened)


@pytest.fixture
def people(model) -> PersonaModel:
    return furnished(model)


@pytest.fixture
def tilting(monkeypatch):
    known = registry.family
    monkeypatch.setattr(registry, "family", lambda name: Tilting if name == "tilting" else known(name))


def lora(model: PersonaModel, seed: int, rank: int = 4) -> LoRA:
    """Strong enough to change what the tiny gemma says, which likes to repeat its prompt's last token."""
    return LoRA.from_tensors(model.base.fingerprint, random_factors(model.base, seed, rank, scale=1.0))


def furnished(model: PersonaModel) -> PersonaModel:
    """alice: two adapters and a group's; bob: the group's; carol: her own, gated."""
    model.adapters.add("alice/voice", lora(model, 1), kind="user")
    model.adapters.add("shared/facts", lora(model, 2, rank=3))
    model.adapters.add("nurses/tone", lora(model, 3, rank=2))
    model.adapters.add("carol/voice", lora(model, 4), kind="user")
    alice = model.persona("alice", groups=["nurses"])
    alice.attach("alice/voice", weight=0.8)
    alice.attach("facts", weight=-0.5)
    model.group("nurses").attach("nurses/tone", weight=1.5)
    model.persona("bob", groups=["nurses"])
    model.persona("carol").attach("carol/voice", state={"gate": [1.0, 0.0, -0.5, 0.25]})
    return model


def composed(model: PersonaModel, persona: str, **options: Any) -> AdapterComposition:
    return compose_adapters(model.base.fingerprint, model.store, model.adapters, persona, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def engine_tokens(model: PersonaModel, composition: AdapterComposition) -> list[tuple[int, ...]]:
    plan = composition.plan
    options = plan.options.model_copy(update={"max_new_tokens": NEW, "ignore_eos": True})
    plan = CompositionPlan(plan.base, plan.parts, options)
    engine = Engine(model.base)
    try:
        done = engine.generate([Request(prompt=p, plan=plan, tensors=composition.tensors) for p in PROMPTS])
    finally:
        engine.close()
    return [completion.tokens for completion in done]


def peft_tokens(model: PersonaModel, folder: Path | None) -> list[tuple[int, ...]]:
    """Greedy tokens of the base with a folder loaded by peft, one whole forward pass per token."""
    module = copy.deepcopy(model.base.module)
    for submodule in module.modules():
        submodule._forward_hooks.clear()
        submodule._forward_pre_hooks.clear()
    if folder is not None:
        module = PeftModel.from_pretrained(module, str(folder)).eval()
    rows = []
    for prompt in PROMPTS:
        ids = list(prompt)
        with torch.inference_mode():
            for _ in range(NEW):
                ids.append(int(module(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        rows.append(tuple(ids[len(prompt) :]))
    return rows


class TestParity:
    def test_peft_says_the_same_tokens(self, any_model, tmp_path):
        base = peft_tokens(any_model, None)
        for persona, rank in (("alice", 9), ("bob", 2), ("carol", 4)):
            made = write_persona(any_model, persona, tmp_path / persona)
            assert made.rank == rank
            expected = peft_tokens(any_model, made.path)
            assert engine_tokens(any_model, composed(any_model, persona)) == expected
            assert expected != base

    def test_the_parts_are_those_of_a_chat(self, people):
        for persona in ("alice", "bob", "carol"):
            reply = people.persona(persona).chat("Hi", max_new_tokens=1)
            assert composed(people, persona).plan.parts == reply.plan.parts

    def test_loads_back_as_a_lora_with_the_same_update(self, people, tmp_path):
        made = write_persona(people, "alice", tmp_path / "alice")
        again = LoRA.from_pretrained(made.path, base=people.base)
        composition = composed(people, "alice")
        expected = low_rank_sum(composition.plan, composition.tensors)
        assert digest(again.tensors) == digest(expected)

    def test_padding_changes_no_logit(self, people, tmp_path):
        plain = write_persona(people, "alice", tmp_path / "plain")
        padded = write_persona(people, "alice", tmp_path / "padded", rank=16)
        assert (plain.rank, padded.rank, plain.max_lora_rank) == (9, 16, 16)
        assert plain.version != padded.version
        pairs = [peft_logits(people.base, made.path) for made in (plain, padded)]
        assert torch.allclose(*pairs, atol=1e-4)
        with pytest.raises(InvalidInputError, match="Cannot pad rank 9 to 8"):
            write_persona(people, "alice", tmp_path / "small", rank=8)
        assert not (tmp_path / "small").exists()


class TestSum:
    @given(
        ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
        gates=st.lists(st.floats(-2, 2), min_size=16, max_size=16),
        seed=st.integers(0, 2**16),
    )
    def test_is_the_dense_sum_whatever_modules_each_patch_names(self, ranks, gates, seed):
        shapes = {"a": (5, 3), "b.c": (2, 4), "d": (3, 3)}
        generator = torch.Generator().manual_seed(seed)
        patches, tensors = [], {}
        expected = {
            name: torch.zeros(d_out, d_in, dtype=torch.float64) for name, (d_in, d_out) in shapes.items()
        }
        for index, rank in enumerate(ranks):
            named = [name for place, name in enumerate(shapes) if (seed >> (index + place)) & 1] or ["a"]
            bundle = low_rank_bundle(
                {
                    name: (
                        torch.randn(rank, shapes[name][0], generator=generator),
                        torch.randn(shapes[name][1], rank, generator=generator),
                    )
                    for name in named
                }
            )
            gate = tuple(gates[4 * index : 4 * index + rank])
            patches.append(LowRankPatch(factors=digest(bundle), rank=rank, gate=gate, origin=str(index)))
            tensors[digest(bundle)] = bundle
            for name, A, B in low_rank_pairs(bundle):
                expected[name] += B.double() @ torch.diag(torch.tensor(gate).double()) @ A.double()
        found = low_rank_sum(CompositionPlan("0" * 64, tuple(patches)), tensors)
        for name, A, B in low_rank_pairs(found):
            assert A.shape[0] == sum(ranks)
            assert torch.allclose(B.double() @ A.double(), expected[name], atol=1e-4)
            del expected[name]
        assert not any(left.any() for left in expected.values())

    def test_half_precision_adapters_are_summed_in_float32(self, tiny):
        half = {name: tensor.bfloat16() for name, tensor in random_factors(tiny, 1).items()}
        one = low_rank_bundle({m: (half[f"{m}.A"], half[f"{m}.B"]) for m in tiny.linear_shapes()})
        plan = CompositionPlan(tiny.fingerprint, (patch(one, (0.1, 0.2, 0.3, 0.4)),))
        found = low_rank_sum(plan, {digest(one): one})
        assert {tensor.dtype for tensor in found.values()} == {torch.float32}
        module = min(tiny.linear_shapes())
        assert torch.equal(
            found[f"{module}.B"], one[f"{module}.B"].float() * torch.tensor([0.1, 0.2, 0.3, 0.4])
        )

    def test_missing_tensors_and_other_shapes_are_refused(self, tiny, tmp_path):
        factors = random_factors(tiny, 1)
        plan = CompositionPlan(tiny.fingerprint, (patch(factors),))
        with pytest.raises(CompositionError, match="are missing"):
            low_rank_sum(plan, {})
        wide = tiny_language_model(hidden=64)
        with pytest.raises(IncompatibleAdapterError, match="the base model's maps"):
            write(AdapterComposition(plan=plan, tensors={digest(factors): factors}), wide, tmp_path / "x")
        assert list(tmp_path.iterdir()) == []


class TestWhatCannotBeWritten:
    def test_is_named_or_listed_and_never_dropped(self, tiny, tmp_path):
        factors = random_factors(tiny, 1)
        passage = PassageRef(cube_id="c", owner="alice", score=0.5, text_sha256="0" * 64)
        parts = (
            patch(factors),
            SoftPrefix(vectors="1" * 64, length=2, origin="alice/soft@1"),
            Passages(items=(passage,)),
            DecodingRule(bias=((3, 1.0),), origin="nurses/rule@2"),
        )
        composition = AdapterComposition(
            plan=CompositionPlan(tiny.fingerprint, parts), tensors={digest(factors): factors}
        )
        named = ("soft_prefix alice/soft@1", "passages recall", "decoding_rule nurses/rule@2")
        with pytest.raises(CompositionError) as caught:
            write(composition, tiny, tmp_path / "strict")
        assert all(name in str(caught.value) for name in named)
        assert list(tmp_path.iterdir()) == []
        assert write(composition, tiny, tmp_path / "partial", partial=True).left_out == named

    def test_a_persona_with_a_soft_prefix(self, people, tilting, tmp_path):
        two = Tilting.from_tensors(people.base.fingerprint, random_factors(people.base, 9, 2))
        people.adapters.add("nurses/tilt", two)
        people.group("nurses").attach("nurses/tilt", state={"prefix": people.base.d_model})
        with pytest.raises(CompositionError, match="soft_prefix nurses/tilt@"):
            write_persona(people, "bob", tmp_path / "bob")
        made = write_persona(people, "bob", tmp_path / "bob", partial=True)
        assert made.left_out == ("soft_prefix nurses/tilt@3",)
        assert [origin.partition("@")[0] for origin in made.origins] == ["nurses/tone", "nurses/tilt"]

    def test_memories_are_named_or_counted(self, people, tmp_path):
        alice, nurses = people.persona("alice"), people.group("nurses")
        alice.remember_all(["Likes tea.", "Has two dogs."])
        made = write_persona(people, "alice", tmp_path / "alice")
        assert (made.left_out, made.skipped) == ((), ("2 memories: they depend on the message",))
        header = CubeHeader(attributes=dict(PINNED))
        added = people.store.commit(nurses.id, kind="group", add=[CubeDraft(text="Be calm.", header=header)])
        name = f"pinned memory nurses/{added.added[0]}"
        with pytest.raises(CompositionError, match=name):
            write_persona(people, "bob", tmp_path / "bob")
        assert write_persona(people, "bob", tmp_path / "bob", partial=True).left_out == (name,)

    @pytest.mark.parametrize("partial", [True, False])
    def test_nothing_to_write(self, people, partial, tmp_path):
        people.persona("dave").remember("Has no adapter.")
        for persona, weight in (("dave", 1.0), ("alice", 0.0)):
            adjust = Adjustment(weight=weight)
            with pytest.raises(CompositionError, match="no low-rank adapter"):
                write_persona(people, persona, tmp_path / "x", adjust=adjust, partial=partial)

    def test_too_much_rank_for_vllm_is_said(self, people, tmp_path):
        made = write_persona(people, "bob", tmp_path / "bob", rank=513)
        with pytest.raises(CompositionError, match="rank 513"):
            _ = made.max_lora_rank


class TestWho:
    def test_groups_can_be_chosen_among_her_own(self, people, tmp_path):
        people.adapters.add("cooks/taste", lora(people, 8))
        people.group("cooks").attach("cooks/taste")
        alice = people.persona("alice", groups=["nurses", "cooks"])
        origins = [
            [p.origin for p in composed(people, alice.id, groups=g).plan.parts] for g in (["cooks"], ())
        ]
        assert [[name.partition("@")[0] for name in row] for row in origins] == [
            ["alice/voice", "shared/facts", "cooks/taste"],
            ["alice/voice", "shared/facts"],
        ]
        with pytest.raises(NotFoundError, match="not in a group 'cooks'"):
            write_persona(people, "bob", tmp_path / "x", groups=["cooks"])
        with pytest.raises(NotFoundError, match="no persona 'nobody'"):
            write_persona(people, "nobody", tmp_path / "x")

    def test_skipped_attachments_are_reported(self, people, tmp_path):
        people.persona("alice").attach("nurses/tone")
        made = write_persona(people, "alice", tmp_path / "a")
        assert made.skipped == ("nurses/tone: attached twice",)
        made = write_persona(people, "alice", tmp_path / "a", groups=[])
        assert made.skipped == ("nurses/tone: out of reach, not among the groups",)

    def test_strengths(self, people):
        def gates(**adjust: Any) -> list[float]:
            return [
                part.gate[0] for part in composed(people, "alice", adjust=Adjustment(**adjust)).plan.low_rank
            ]

        assert gates() == [0.8, -0.5, 1.5]
        assert gates(weight=0.5) == pytest.approx([0.4, -0.25, 0.75])
        assert gates(weights={"nurses/tone": 0.5}) == pytest.approx([0.8, -0.5, 0.75])
        assert gates(weights={"shared/facts": 0.0}) == [0.8, 1.5]
        with pytest.raises(InvalidInputError, match="'nurses/ton' is not attached"):
            gates(weights={"nurses/ton": 0.5})
        for wrong in (float("nan"), 11.0, float("-inf")):
            with pytest.raises(InvalidInputError, match="factor"):
                gates(weight=wrong)

    def test_a_preference_goes_to_the_families_that_have_one(self, people, tilting):
        two = Tilting.from_tensors(people.base.fingerprint, random_factors(people.base, 9, 2))
        people.adapters.add("nurses/tilt", two)
        people.group("nurses").attach("nurses/tilt", weight=2.0)
        wanted = Adjustment(preference={"concise": 0.7, "detailed": 0.3})
        voice, facts, tone, tilt = composed(people, "alice", adjust=wanted).plan.low_rank
        assert tilt.gate == pytest.approx((1.4, 0.6))
        assert (voice.gate, facts.gate, tone.gate) == ((0.8,) * 4, (-0.5,) * 3, (1.5,) * 2)
        with pytest.raises(InvalidInputError, match=r"No adapter of 'alice' takes .*rude"):
            composed(people, "alice", adjust=Adjustment(preference={"rude": 1.0}))
        with pytest.raises(InvalidInputError, match=r"No adapter of 'carol' takes .*concise"):
            composed(people, "carol", adjust=wanted)


class TestBytes:
    def test_are_the_same_for_the_same_composition_in_every_process(self, people, tmp_path):
        one = write_persona(people, "alice", tmp_path / "one")
        again = [write_persona(people, "alice", tmp_path / f"{index}") for index in range(4)]
        assert {made.version for made in again} == {one.version}
        assert all(files(made.path) == files(one.path) for made in again)
        program = (
            "import sys; from persona_sdk.adapter_composition import AdapterComposition as C\n"
            "from persona_sdk.materialize import write; from persona_sdk.plan import CompositionPlan\n"
            "from persona_sdk.testing import tiny_language_model; from persona_sdk.adapters import folders\n"
            "from persona_sdk.tensors import digest\n"
            "from pathlib import Path\n"
            "base = tiny_language_model(); t, _ = folders.read_tensors(Path(sys.argv[1]))\n"
            "plan = CompositionPlan.from_json(sys.argv[2])\n"
            "made = write(C(plan=plan, tensors={digest(t): t}), base, sys.argv[3]); print(made.version)\n"
        )
        factors = random_factors(people.base, 1)
        plan = CompositionPlan(people.base.fingerprint, (patch(factors, (1.0, 2.0, 0.5, 0.1)),))
        mine = write(
            AdapterComposition(plan=plan, tensors={digest(factors): factors}), people.base, tmp_path / "m"
        )
        from safetensors.torch import save_file

        save_file(dict(factors), tmp_path / "factors.safetensors")
        command = [sys.executable, "-W", "ignore", "-c", program, tmp_path / "factors.safetensors"]
        done = subprocess.run(
            [*command, plan.to_json(), tmp_path / "other"], capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == [mine.version]
        assert files(tmp_path / "other") == files(mine.path)

    def test_the_header_keeps_its_promises(self, people, tmp_path):
        made = write_persona(people, "alice", tmp_path / "alice")
        found = peft_format.read(made.path, base=people.base)
        assert found.base == people.base.fingerprint
        assert sources_of(made.path) == composed(people, "alice").sources
        assert len(sources_of(made.path)) == 3
        config = json.loads((made.path / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (9, 9)

    @pytest.mark.parametrize("change", ["weight", "adapter", "group", "base name"])
    def test_every_change_is_another_version(self, people, change, tmp_path):
        before = write_once(composed(people, "alice"), people.base, tmp_path / "cache")
        old = files(before.path)
        name = None
        if change == "weight":
            people.persona("alice").attach("alice/voice", weight=0.7)
        elif change == "adapter":
            people.adapters.add("alice/voice", lora(people, 11), kind="user")
            assert write_once(composed(people, "alice"), people.base, tmp_path / "cache") == before  # pinned
            people.persona("alice").attach("alice/voice", weight=0.8)
        elif change == "group":
            people.group("nurses").detach("nurses/tone")
        else:
            name = "another"
        after = write_once(composed(people, "alice"), people.base, tmp_path / "cache", base_name=name)
        assert after.version != before.version
        assert after.path != before.path
        assert files(before.path) == old

    def test_a_folder_is_written_once_and_whole(self, people, tmp_path, monkeypatch):
        cache = tmp_path / "cache"
        first = write_once(composed(people, "alice"), people.base, cache)
        stamp = first.path.stat().st_mtime_ns
        assert write_once(composed(people, "alice"), people.base, cache) == first
        assert first.path.stat().st_mtime_ns == stamp
        assert [path.name for path in cache.iterdir()] == [first.version]

        def broken(path: Path) -> None:
            raise OSError("no space left")

        monkeypatch.setattr(materialize, "_sort_header", broken)
        with pytest.raises(AdapterError, match="no space left"):
            write_once(composed(people, "bob"), people.base, cache)
        assert [path.name for path in cache.iterdir()] == [first.version]

    def test_somebody_else_may_be_first(self, people, tmp_path, monkeypatch):
        cache = tmp_path / "cache"
        elsewhere = write_once(composed(people, "alice"), people.base, tmp_path / "elsewhere")
        slow = materialize.write

        def late(*arguments: Any, **options: Any) -> Any:
            made = slow(*arguments, **options)
            elsewhere.path.rename(cache / elsewhere.version)  # between our check and our rename
            return made

        monkeypatch.setattr(materialize, "write", late)
        made = write_once(composed(people, "alice"), people.base, cache)
        assert made.path == cache / elsewhere.version
        assert [path.name for path in cache.iterdir()] == [elsewhere.version]
