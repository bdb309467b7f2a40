"""Families by name: lazy, open to other packages, and not brought down by a broken one."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from persona_sdk import registry
from persona_sdk.adapters import Adapter, LoRA
from persona_sdk.errors import AdapterError, NotFoundError


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    registry.family.cache_clear()
    yield
    registry.family.cache_clear()


def declare(monkeypatch: pytest.MonkeyPatch, **points: str) -> None:
    real = registry.entry_points
    extra = [EntryPoint(name, value, registry.GROUP) for name, value in points.items()]
    monkeypatch.setattr(registry, "entry_points", lambda **kind: [*extra, *real(**kind)])


def test_every_built_in_family_loads_and_knows_its_name() -> None:
    assert "lora" in registry.families()
    assert registry.family("lora") is LoRA
    for name in registry.families():
        found = registry.family(name)
        assert issubclass(found, Adapter)
        assert found.family == name


def test_an_unknown_family_is_answered_with_the_known_ones() -> None:
    with pytest.raises(NotFoundError, match="'lore'") as caught:
        registry.family("lore")
    assert "lora" in caught.value.hint


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("no_such_package.module:Family", "ModuleNotFoundError"),
        ("persona_sdk.adapters.lora:NoSuchClass", "AttributeError"),
        ("persona_sdk.adapters.lora:select_modules", "no subclass of Adapter"),
        ("persona_sdk.config:FrozenConfig", "no subclass of Adapter"),
        ("persona_sdk.adapters.lora:LoRA", "calls itself 'lora'"),
    ],
)
def test_a_broken_family_is_reported_and_the_others_work(
    value: str, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    declare(monkeypatch, broken=value)
    assert {"broken", "lora"} <= set(registry.families())
    with caplog.at_level(logging.WARNING, logger="persona_sdk"), pytest.raises(AdapterError, match=reason):
        registry.family("broken")
    assert "'broken'" in caplog.text
    assert registry.family("lora") is LoRA


def test_a_plug_in_that_fails_in_its_own_way_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Any) -> Any:
        raise ZeroDivisionError("while importing")

    declare(monkeypatch, odd="some.module:Thing")
    monkeypatch.setattr(EntryPoint, "load", load)
    with pytest.raises(AdapterError, match="ZeroDivisionError: while importing"):
        registry.family("odd")


def test_nobody_can_take_the_name_of_a_built_in_family(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    declare(monkeypatch, lora="evil.module:LoRA")
    with caplog.at_level(logging.WARNING, logger="persona_sdk"):
        assert registry.family("lora") is LoRA
    assert "is hidden by that of persona-sdk" in caplog.text


def test_listing_families_loads_none() -> None:
    code = (
        "import sys; from persona_sdk import registry; assert 'lora' in registry.families();"
        "assert not {'torch', 'peft', 'persona_sdk.adapters'} & set(sys.modules), 'loaded too much'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
