"""The vLLM plugin: what a name resolves to, what is refused, and that a reader never sees half a folder.

The last test needs vLLM in an environment of its own, whose interpreter PERSONA_VLLM_PYTHON names.
"""

import asyncio
import copy
import json
import os
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel

from persona_sdk import CompositionPlan, LoRA, PersonaModel, weights
from persona_sdk.adapter_composition import compose_adapters
from persona_sdk.adapters import peft_format
from persona_sdk.engine import Engine, Request
from persona_sdk.errors import CompositionError, IncompatibleAdapterError, InvalidInputError, NotFoundError
from persona_sdk.materialize import materialize
from persona_sdk.models import LanguageModel
from persona_sdk.persona_names import NotANameError
from persona_sdk.plan import Contribution, SoftPrefix
from persona_sdk.testing import HashEmbedder, tiny_language_model
from persona_sdk.vllm_resolver import PersonaResolver, lora_id, register, skeleton

from .adapters.support import PEFT_WARNINGS
from .engine.support import random_factors

pytestmark = pytest.mark.filterwarnings(PEFT_WARNINGS)

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny = tiny_language_model()
    copy.deepcopy(tiny.module).save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def people(tmp_path, base_folder) -> Iterator[PersonaModel]:
    base = LanguageModel.from_pretrained(str(base_folder), device="cpu")
    with PersonaModel.from_pretrained(base, store=tmp_path / "store", embedder=HashEmbedder()) as opened:
        yield furnished(opened)


@pytest.fixture
def resolver(tmp_path, people) -> PersonaResolver:
    return PersonaResolver(tmp_path / "store", tmp_path / "exports")


@dataclass
class LoRARequest:
    """As vLLM's."""

    lora_name: str
    lora_int_id: int
    lora_path: str


class Registry:
    def __init__(self) -> None:
        self.resolvers: dict[str, Any] = {}

    def register_resolver(self, name: str, resolver: Any) -> None:
        self.resolvers[name] = resolver


@pytest.fixture
def vllm(monkeypatch) -> Registry:
    """A stand-in for the parts of vLLM that the plugin touches."""
    from abc import ABC, abstractmethod

    class LoRAResolver(ABC):
        @abstractmethod
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any: ...

    request, resolver = ModuleType("vllm.lora.request"), ModuleType("vllm.lora.resolver")
    request.LoRARequest = LoRARequest
    resolver.LoRAResolver, resolver.LoRAResolverRegistry = LoRAResolver, Registry()
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.lora", ModuleType("vllm.lora"))
    monkeypatch.setitem(sys.modules, "vllm.lora.request", request)
    monkeypatch.setitem(sys.modules, "vllm.lora.resolver", resolver)
    return resolver.LoRAResolverRegistry


def lora(model: PersonaModel, seed: int, rank: int, scale: float = 0.5) -> LoRA:
    return LoRA.from_tensors(model.base.fingerprint, random_factors(model.base, seed, rank, scale))


def furnished(model: PersonaModel) -> PersonaModel:
    """alice: her own adapter and the nurses'; bob: the nurses'; carol: her own, gated, and a shared one."""
    model.adapters.add("alice/voice", lora(model, 1, 8), kind="user")
    model.adapters.add("nurses/tone", lora(model, 2, 4))
    model.adapters.add("carol/voice", lora(model, 3, 5), kind="user")
    model.adapters.add("facts", lora(model, 4, 2))
    model.persona("alice", groups=["nurses"]).attach("alice/voice")
    model.persona("bob", groups=["nurses"])
    model.group("nurses").attach("nurses/tone", weight=0.7)
    carol = model.persona("carol")
    carol.attach("carol/voice", state={"gate": [1.0, 0.5, -0.5, 1.5, 0.0]})
    carol.attach("facts", weight=-0.6)
    return model


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class TestResolve:
    def test_a_name_is_the_folder_of_its_composition(self, people, resolver, base_folder, tmp_path):
        found = resolver.resolve(str(base_folder), "alice")
        assert found.path == tmp_path / "exports" / found.version
        assert files(found.path) == files(materialize(people, "alice", tmp_path / "by_hand").path)
        assert peft_format.read(found.path, base=people.base).base == people.base.fingerprint
        half = resolver.resolve(str(base_folder), "alice+nurses@weight=0.5,nurses/tone=0")
        assert [origin.partition("@")[0] for origin in half.origins] == ["alice/voice"]
        assert resolver.resolve(str(base_folder), "alice@weight=0.5,nurses/tone=0").path == half.path
        assert resolver.resolve(str(base_folder), "nurses").rank == 4

    def test_a_version_is_a_name_that_never_changes_its_meaning(self, people, resolver, base_folder):
        old = resolver.resolve(str(base_folder), "alice")
        pinned = f"alice#{old.version[:16]}"
        assert resolver.resolve(str(base_folder), pinned).path == old.path
        people.group("nurses").attach("nurses/tone", weight=0.9)
        new = resolver.resolve(str(base_folder), "alice")
        assert new.path != old.path
        assert lora_id("alice", new.version) != lora_id("alice", old.version)
        with pytest.raises(NotFoundError, match=f"#{new.version[:16]}"):
            resolver.resolve(str(base_folder), pinned)

    def test_what_is_not_there(self, people, resolver, base_folder):
        for name in ("nobody", "alice+cooks", "bob+alice"):
            with pytest.raises(NotFoundError):
                resolver.resolve(str(base_folder), name)
        with pytest.raises(NotANameError):
            resolver.resolve(str(base_folder), "../alice")
        with pytest.raises(InvalidInputError, match="takes the preference"):
            resolver.resolve(str(base_folder), "alice@concise=0.7")
        assert people.store.kind_of("nobody") is None

    def test_what_a_lora_cannot_hold_is_refused_or_logged(
        self, people, base_folder, tmp_path, monkeypatch, caplog
    ):
        plain = LoRA.contribute

        def with_prefix(self: LoRA, state: Any, request: Any) -> Contribution:
            made = plain(self, state, request)
            soft = SoftPrefix(vectors="1" * 64, length=1, origin=request.origin)
            return Contribution((*made.parts, soft), made.tensors)

        monkeypatch.setattr(LoRA, "contribute", with_prefix)
        where = tmp_path / "store", tmp_path / "exports"
        with pytest.raises(CompositionError, match="soft_prefix nurses/tone@"):
            PersonaResolver(*where).resolve(str(base_folder), "bob")
        assert PersonaResolver(*where, partial=True).resolve(str(base_folder), "bob").left_out
        assert "'bob' is served without soft_prefix nurses/tone@" in caplog.text

    def test_another_base_is_refused(self, people, tmp_path, base_folder):
        other = tiny_language_model(seed=1)
        copy.deepcopy(other.module).save_pretrained(tmp_path / "other")
        other.tokenizer.save_pretrained(tmp_path / "other")
        where = tmp_path / "store", tmp_path / "exports"
        with pytest.raises(IncompatibleAdapterError, match="was made for base model"):
            PersonaResolver(*where).resolve(str(tmp_path / "other"), "alice")
        configured = PersonaResolver(*where, model=str(base_folder))
        with pytest.raises(IncompatibleAdapterError, match="their weights differ"):
            configured.resolve(str(tmp_path / "other"), "alice")
        assert configured.resolve("served-from-elsewhere", "alice").path.is_dir()

    def test_a_store_that_is_not_there_is_not_made(self, tmp_path, base_folder):
        with pytest.raises(NotFoundError, match="holds no store"):
            PersonaResolver(tmp_path / "none", tmp_path / "exports").resolve(str(base_folder), "alice")
        assert not (tmp_path / "none").exists()

    def test_the_skeleton_is_the_model_without_its_weights(self, base_folder):
        whole, bare = LanguageModel.from_pretrained(str(base_folder)), skeleton(str(base_folder))
        assert bare.fingerprint == whole.fingerprint
        assert bare.linear_shapes() == whole.linear_shapes()
        assert {parameter.device.type for parameter in bare.module.parameters()} == {"meta"}


class TestPrune:
    def test_what_was_forgotten_goes_and_nothing_else(self, people, resolver, base_folder, tmp_path):
        kept = resolver.resolve(str(base_folder), "carol").path
        gone = resolver.resolve(str(base_folder), "alice").path
        exports = tmp_path / "exports"
        (exports / "notes").mkdir()
        damaged = exports / ("0" * 64)
        damaged.mkdir()
        crashed = exports / f".{'0' * 32}.new"
        crashed.mkdir()
        os.utime(crashed, (0, 0))
        busy = exports / f".{'1' * 32}.new"
        busy.mkdir()
        people.persona("alice").detach("alice/voice")
        assert set(resolver.prune()) == {damaged, crashed}  # detached is not forgotten
        people.persona("alice").forget(people.adapters.find("alice/voice").id)
        fresh = PersonaResolver(tmp_path / "store", exports)
        assert fresh.resolve(str(base_folder), "carol").path == kept
        assert sorted(exports.iterdir()) == sorted([kept, busy, exports / "notes"])
        assert not gone.exists()

    def test_it_lets_the_store_be_scrubbed(self, people, resolver, base_folder):
        resolver.resolve(str(base_folder), "alice")
        assert people.persona("alice").forget_everything().scrubbed
        with pytest.raises(NotFoundError):
            resolver.resolve(str(base_folder), "alice")


class TestConcurrency:
    def test_readers_never_see_half_a_folder(self, people, base_folder, tmp_path):
        exports, done, seen, wrong = tmp_path / "exports", threading.Event(), set(), []

        def watch() -> None:
            while not done.is_set():
                for folder in exports.glob("[0-9a-f]*"):
                    try:
                        peft_format.read(folder)
                        seen.add(folder.name)
                    except Exception as error:
                        wrong.append(error)

        reader = threading.Thread(target=watch)
        reader.start()
        names = [f"{who}@weight=0.{digit}" for who in ("alice", "bob", "carol") for digit in range(1, 4)] * 3
        resolvers = [PersonaResolver(tmp_path / "store", exports) for _ in range(2)]
        with ThreadPoolExecutor(6) as pool:
            jobs = [pool.submit(resolvers[i % 2].resolve, str(base_folder), n) for i, n in enumerate(names)]
            paths = [job.result().path for job in jobs]
        done.set()
        reader.join()
        assert not wrong
        assert seen
        assert paths[:9] == paths[9:18] == paths[18:]
        assert {path.name for path in exports.iterdir()} == {path.name for path in paths}


class TestPlugin:
    def test_it_answers_as_vllm_expects(self, people, vllm, base_folder, tmp_path, monkeypatch, caplog):
        monkeypatch.setenv("PERSONA_STORE", str(tmp_path / "store"))
        monkeypatch.setenv("PERSONA_EXPORTS", str(tmp_path / "elsewhere"))
        register()
        resolver = vllm.resolvers["persona_sdk"]
        assert isinstance(resolver, sys.modules["vllm.lora.resolver"].LoRAResolver)

        def ask(name: str, base: str = str(base_folder)) -> Any:
            return asyncio.run(resolver.resolve_lora(base, name))

        found = ask("alice")
        assert isinstance(found, LoRARequest)
        assert found.lora_name == "alice"
        assert Path(found.lora_path).parent == tmp_path / "elsewhere"
        assert found == ask("alice")
        for name in ("nobody", "../alice", "alice+cooks", "alice#0123456789abcdef", "org/adapter"):
            assert ask(name) is None
            assert f"{name!r} is not served" in caplog.text
        assert ask("alice", str(tmp_path / "no model")) is None
        with pytest.raises(ValueError, match="takes the preference"):  # vLLM makes it a 400 with this text
            ask("alice@concise=0.7")

    def test_without_a_store_it_does_nothing(self, vllm, monkeypatch):
        monkeypatch.delenv("PERSONA_STORE", raising=False)
        register()
        assert vllm.resolvers == {}

    def test_the_environment(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PERSONA_CACHE", str(tmp_path))
        made = PersonaResolver.from_environment({"PERSONA_STORE": "s", "PERSONA_MODEL": ""})
        assert (made._folder, made._exports.parent) == (Path("s"), tmp_path / "exports")
        other = PersonaResolver.from_environment({"PERSONA_STORE": "t"})
        assert other._exports != made._exports  # each deletes what its own store no longer holds
        assert (made._model, made._partial) == (None, False)
        made = PersonaResolver.from_environment({"PERSONA_STORE": "s", "PERSONA_EXPORT_PARTIAL": "1"})
        assert made._partial
        assert PersonaResolver.from_environment({}) is None

    def test_ids_are_the_same_in_every_process(self):
        assert lora_id("alice", "a" * 64) == 8028713813833550352  # never Python's hash()
        assert lora_id("alice", "b" * 64) != lora_id("alice", "a" * 64) != lora_id("bob", "a" * 64)

    def test_the_entry_point_leads_to_it(self):
        points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
        module, _, name = points["vllm.general_plugins"]["persona_sdk"].partition(":")
        assert getattr(import_module(module), name) is register


PROMPTS = (
    "How warm is 80 degrees Fahrenheit?",
    "Write one sentence about the sea.",
    "What should a nurse say to a worried patient?",
    "Name three colours.",
)
NEW = 24
NAMES = {
    "alice": "alice",
    "bob": "bob+nurses",
    "carol": "carol",
}


@pytest.fixture(scope="module")
def vllm_python() -> str:
    found = os.environ.get("PERSONA_VLLM_PYTHON")
    if not found:
        pytest.skip("could not find vLLM: PERSONA_VLLM_PYTHON names no interpreter")
    return found


@pytest.mark.model
def test_vllm_peft_and_the_engine_say_the_same(smollm2, vllm_python, tmp_path):
    """12 rows of three personas, and the base, greedy: equal tokens from three implementations."""
    with PersonaModel.from_pretrained(smollm2, store=tmp_path / "store", embedder=HashEmbedder()) as model:
        furnished(model)
        ids = [
            tuple(smollm2.tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=True,
                  add_generation_prompt=True, return_dict=False))
            for text in PROMPTS
        ]  # fmt: skip
        folders = {who: materialize(model, who, tmp_path / who).path for who in NAMES}
        ours = {who: engine_tokens(model, who, ids) for who in ("", *NAMES)}
    assert {who: peft_tokens(smollm2, folder, ids) for who, folder in folders.items()} == {
        who: ours[who] for who in NAMES
    }
    assert all(row not in ours[""] for who in NAMES for row in ours[who]), "the adapters change nothing"

    theirs = run_vllm(
        vllm_python,
        tmp_path,
        {
            "prompts": ids,
            "new": NEW,
            "folders": {who: str(folder) for who, folder in folders.items()},
            "names": list(NAMES.values()),
            "refused": ["nobody", "../alice", "bob+cooks"],
        },
    )
    assert theirs["is_a_resolver"]
    assert theirs["base"] == ours[""]
    for who, name in NAMES.items():
        assert theirs["direct"][who] == ours[who], who
        assert theirs["resolved"][name] == ours[who], name
        asked, number, path = theirs["requests"][name]
        assert asked == name
        assert number == lora_id(name, Path(path).name)
    assert theirs["refused"] == {"nobody": True, "../alice": True, "bob+cooks": True}


def engine_tokens(model: PersonaModel, who: str, prompts: list[tuple[int, ...]]) -> list[list[int]]:
    options = CompositionPlan("").options.model_copy(update={"max_new_tokens": NEW, "ignore_eos": True})
    parts, tensors = (), {}
    if who:
        composition = compose_adapters(model.base.fingerprint, model.store, model.adapters, who)
        parts, tensors = composition.plan.parts, composition.tensors
    plan = CompositionPlan(model.base.fingerprint, parts, options)
    engine = Engine(model.base)
    try:
        done = engine.generate([Request(prompt=prompt, plan=plan, tensors=tensors) for prompt in prompts])
    finally:
        engine.close()
    return [list(completion.tokens) for completion in done]


def peft_tokens(base: LanguageModel, folder: Path, prompts: list[tuple[int, ...]]) -> list[list[int]]:
    module = copy.deepcopy(base.module)
    for submodule in module.modules():
        submodule._forward_hooks.clear()
        submodule._forward_pre_hooks.clear()
    served = PeftModel.from_pretrained(module, str(folder)).eval()
    rows = []
    for prompt in prompts:
        given, cache, row = torch.tensor([prompt]), None, []
        with torch.inference_mode():
            for _ in range(NEW):
                step = served(input_ids=given, past_key_values=cache, use_cache=True)
                cache, given = step.past_key_values, step.logits[:, -1:].argmax(-1)
                row.append(int(given))
        rows.append(row)
    return rows


def run_vllm(python: str, folder: Path, jobs: dict[str, Any]) -> dict[str, Any]:
    """Run tests/vllm_process.py there, with this package and its entry points in reach of vLLM's loader."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    info = folder / "installed" / "persona_sdk-0.dist-info"
    info.mkdir(parents=True)
    groups = [
        [f"[{group}]", *(f"{name} = {value}" for name, value in named.items())]
        for group, named in points.items()
    ]
    (info / "entry_points.txt").write_text("\n".join(line for group in groups for line in [*group, ""]))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: persona-sdk\nVersion: 0\n")
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(info.parent)]),
        "PERSONA_EXPORTS": str(folder / "exports"),
    }
    arguments = [weights.resolve("smollm2-135m"), folder / "store", folder / "jobs.json", folder / "out.json"]
    command = [python, ROOT / "tests" / "vllm_process.py", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads((folder / "out.json").read_text())
