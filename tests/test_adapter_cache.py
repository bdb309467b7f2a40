"""Adapters in use: shells stay, weights come and go, forgetting clears both."""

import subprocess
import sys
import threading

from persona_sdk.adapter_cache import AdapterCache

from .support import lora

# Type checks under pytest look into every mapping, so laziness is told in a process without them.
LAZY = """
import tempfile
from persona_sdk import LoRA, PersonaModel
from persona_sdk import adapter_cache
from persona_sdk.adapter_cache import AdapterCache, PlanTensors
from persona_sdk.tensors import LazyBundle
from persona_sdk.adapters import AdapterRequest
from persona_sdk.tensors import digest, low_rank_bundle, size_bytes
from persona_sdk.testing import HashEmbedder, tiny_language_model
import torch

base = tiny_language_model()
model = PersonaModel.from_pretrained(base, store=tempfile.mkdtemp(), embedder=HashEmbedder())
wholes, cubes, reads = [], [], []
for n in range(10):
    shapes = base.linear_shapes().items()
    factors = {p: (torch.full((4, i), n + 1.0), torch.ones(o, 4)) for p, (i, o) in shapes}
    wholes.append(LoRA.from_tensors(base.fingerprint, low_rank_bundle(factors)))
    cubes.append(model.persona(f"u{n}").add_adapter("style", wholes[-1]))
cache = AdapterCache(lambda cube: (reads.append(cube.owner), model.adapters._read(cube))[1])
adapter_cache._WEIGHT_BYTES = 1  # room for one
shells = [cache.get(cube) for cube in cubes]
assert len(reads) == 10
assert [cache.get(cube) for cube in cubes] == shells
contributions = [shell.contribute({}, AdapterRequest(origin="x")) for shell in shells]
tensors = PlanTensors({key: value for c in contributions for key, value in c.tensors.items()})
assert all(whole.digest in tensors for whole in wholes) and len(tensors) == 10
assert len(reads) == 10, "contributing read weights"
assert cache.weight_bytes == size_bytes(wholes[9].tensors)
bundle = tensors[wholes[0].digest]
assert reads[10:] == ["u0"] and not isinstance(bundle, LazyBundle)
assert digest(bundle) == wholes[0].digest
model.close()
print("as expected")
"""


def test_shells_contribute_without_weights_which_are_read_as_one_bundle():
    done = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True, check=False)
    assert "as expected" in done.stdout, done.stderr


def test_forgetting_while_weights_are_read_keeps_nothing(model):
    cube = model.persona("alice").add_adapter("style", lora(model, 1))
    reading, go_on = threading.Event(), threading.Event()

    def slow(cube):
        adapter = model.adapters._read(cube)
        reading.set()
        go_on.wait(10)
        return adapter

    cache = AdapterCache(slow)
    thread = threading.Thread(target=cache.get, args=(cube,))
    thread.start()
    reading.wait(10)
    cache.clear()
    go_on.set()
    thread.join()
    assert len(cache) == 0
    assert cache.weight_bytes == 0
