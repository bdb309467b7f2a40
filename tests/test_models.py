"""Base models: what a fingerprint is and is not, what is refused, and the two embedded models themselves."""

import json
import os
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from persona_sdk import fingerprints, models, weights
from persona_sdk.embedders import Embedder, SentenceEmbedder, load_embedder
from persona_sdk.errors import InvalidInputError, ModelError
from persona_sdk.models import LanguageModel, fingerprint_of, linear_shape
from persona_sdk.testing import HashEmbedder, tiny_language_model

SMOLLM2 = "cf73be0c064bcf1cc2e8dbb936867537522345d4f71886445d95881314510ab0"
MINILM = "beca1368dfc27b9f6892557a1ce8665c9c4855acdf583b4e58b95f92af3c7c64"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("PERSONA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def save(model: LanguageModel, folder):
    """A transformers folder, as old as one that was downloaded yesterday."""
    model.module.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path, cache):
    return save(tiny_language_model(), tmp_path / "model")


@pytest.fixture
def settled(monkeypatch):
    """Let files count as old at once; the clock's part is tested on its own."""
    monkeypatch.setattr(fingerprints.time, "time_ns", lambda: 2**62)


@pytest.fixture
def hashed(monkeypatch):
    """Counts how often weights are really hashed."""
    calls = []

    def counting(module):
        calls.append(module)
        return fingerprint_of(module)

    monkeypatch.setattr(models, "fingerprint_of", counting)
    return calls


def load(folder, **options) -> LanguageModel:
    return LanguageModel.from_pretrained(str(folder), device="cpu", **options)


# Fingerprints


def test_a_folder_has_the_fingerprint_of_the_model_saved_into_it(folder, tiny):
    loaded = load(folder)
    assert loaded.fingerprint == tiny.fingerprint
    for name, parameter in tiny.module.named_parameters():
        assert torch.equal(loaded.module.get_parameter(name), parameter)
    assert not any(p.requires_grad for p in loaded.module.parameters())
    assert not loaded.module.training


def test_requested_precision_does_not_change_the_fingerprint(folder):
    plain, half = load(folder), load(folder, dtype="bfloat16")
    assert (plain.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert half.fingerprint == plain.fingerprint
    assert half.module.model.rotary_emb.inv_freq.dtype == torch.float32


def test_stored_precision_counts_by_value_only(tmp_path, cache):
    rounded = tiny_language_model()
    rounded.module.bfloat16()
    as_bfloat16 = save(rounded, tmp_path / "bfloat16")
    rounded.module.float()
    as_float32 = save(rounded, tmp_path / "float32")
    assert load(as_bfloat16).fingerprint == load(as_float32).fingerprint != tiny_language_model().fingerprint


def test_heads_and_activation_are_part_of_the_fingerprint(tiny):
    for change in ({"num_attention_heads": 8}, {"hidden_act": "gelu"}):
        other = tiny_language_model()
        other.module.config.update(change)
        assert fingerprint_of(other.module) != tiny.fingerprint


def test_one_changed_weight_changes_the_fingerprint(tiny):
    other = tiny_language_model()
    with torch.no_grad():
        other.module.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-6
    assert fingerprint_of(other.module) != tiny.fingerprint


def test_weights_are_hashed_once_per_state_of_the_folder(folder, settled, hashed):
    first, second = load(folder), load(folder)
    assert first.fingerprint == second.fingerprint
    assert len(hashed) == 1


def test_a_folder_written_a_moment_ago_is_not_recorded(folder, hashed):
    load(folder)
    load(folder)
    assert len(hashed) == 2


def test_a_change_in_place_is_noticed_even_with_the_old_size_and_time(folder, settled):
    before = load(folder).fingerprint
    file = folder / "model.safetensors"
    stat = file.stat()
    data = bytearray(file.read_bytes())
    data[-2] ^= 0x01  # one mantissa bit of the last weight
    with open(file, "r+b") as stream:
        stream.write(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_size == stat.st_size
    assert file.stat().st_mtime_ns == stat.st_mtime_ns
    assert load(folder).fingerprint != before


def test_symlinked_weights_are_followed(folder, tmp_path, settled):
    """The hub's cache holds snapshots of symlinks to blobs."""
    snapshot, other = tmp_path / "snapshot", save(tiny_language_model(seed=5), tmp_path / "other")
    snapshot.mkdir()
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(file)
    before = load(snapshot).fingerprint
    assert before == load(folder).fingerprint
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(other / "model.safetensors")
    assert load(snapshot).fingerprint == tiny_language_model(seed=5).fingerprint != before


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"fingerprint": 7}', '{"fingerprint": "abc"}'])
def test_a_damaged_record_is_ignored_and_written_anew(folder, cache, settled, hashed, damage):
    before = load(folder).fingerprint
    (record,) = (cache / "fingerprints").iterdir()
    record.write_text(damage)
    assert load(folder).fingerprint == before
    assert json.loads(record.read_text())["fingerprint"] == before
    assert len(hashed) == 2


def test_a_cache_that_cannot_be_written_costs_only_time(folder, cache, settled):
    cache.write_text("a file where the folder should be")
    assert load(folder).fingerprint == tiny_language_model().fingerprint


# What is refused


def test_pickled_weights_are_refused(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"does not hold a causal language model"):
        load(folder)


def test_missing_weights_are_refused_instead_of_made_up(folder):
    state = load_file(folder / "model.safetensors")
    state.pop("model.layers.1.mlp.up_proj.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of the weights .* model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "{"),
        ("config.json", '{"model_type": "no-such-model"}'),
        ("config.json", '{"model_type": "t5"}'),
        ("model.safetensors", "not safetensors"),
        ("tokenizer.json", "{"),
    ],
)
def test_a_damaged_folder_is_a_model_error(folder, file, content):
    (folder / file).write_text(content)
    with pytest.raises(ModelError, match=str(folder)):
        load(folder)


def test_unusable_devices_and_precisions_are_named(folder):
    for options in ({"device": "tpu9"}, {"device": "cuda:99"}):
        with pytest.raises(InvalidInputError, match=options["device"]):
            LanguageModel.from_pretrained(str(folder), **options)
    for name in ("int8", "load", "float33"):
        with pytest.raises(InvalidInputError, match=name):
            load(folder, dtype=name)


# Linear maps


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("llama", {"q_proj": (32, 32), "k_proj": (32, 16), "up_proj": (32, 64), "down_proj": (64, 32)}),
        ("qwen2", {"q_proj": (32, 32), "v_proj": (32, 16), "gate_proj": (32, 64), "o_proj": (32, 32)}),
        ("gemma", {"q_proj": (32, 64), "k_proj": (32, 32), "o_proj": (64, 32), "down_proj": (64, 32)}),
        (
            "gpt2",
            {"attn.c_attn": (32, 96), "attn.c_proj": (32, 32), "c_fc": (32, 64), "mlp.c_proj": (64, 32)},
        ),
    ],
)
def test_linears_are_every_linear_map_but_the_head(architecture, expected):
    model = tiny_language_model(architecture=architecture)
    shapes = model.linear_shapes()
    assert len(shapes) == 2 * (4 if architecture == "gpt2" else 7)
    assert not any("head" in path or "embed" in path for path in shapes)
    for end, shape in expected.items():
        assert {s for path, s in shapes.items() if path.endswith(f".{end}")} == {shape}
    for path, module in model.linears().items():
        d_in, d_out = shapes[path]
        assert linear_shape(module) == (d_in, d_out)
        assert module(torch.zeros(1, d_in)).shape == (1, d_out)
    assert model.d_model == 32
    assert model.context_length == 512


# Embedders


def test_an_embedder_is_returned_as_it_is():
    embedder = HashEmbedder()
    assert load_embedder(embedder) is embedder
    assert isinstance(embedder, Embedder)


def test_a_named_embedder_is_not_loaded_until_it_is_used(cache):
    embedder = load_embedder("no-such-embedder")
    assert isinstance(embedder, SentenceEmbedder)
    with pytest.raises(ModelError, match="no-such-embedder"):
        embedder.encode(["text"])


@pytest.fixture
def sentence_folder(tmp_path, cache):
    """A sentence-transformers folder whose files are never reached by the tests that refuse it."""
    folder = tmp_path / "sentence"
    (folder / "1_Dense").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("type_name", "file"),
    [("os.system", "model.safetensors"), ("sentence_transformers.models.Dense", "w.bin")],
)
def test_embedders_that_would_run_code_are_refused(sentence_folder, type_name, file):
    (sentence_folder / "modules.json").write_text(json.dumps([{"type": type_name, "path": "1_Dense"}]))
    (sentence_folder / "1_Dense" / file).write_bytes(b"")
    with pytest.raises(ModelError, match="would run code"):
        SentenceEmbedder(str(sentence_folder)).encode(["text"])


# The embedded models


@pytest.mark.model
def test_smollm2_is_the_model_it_should_be(smollm2):
    assert sum(p.numel() for p in smollm2.module.parameters()) == 134_515_008
    assert smollm2.fingerprint == SMOLLM2
    assert fingerprint_of(smollm2.module) == SMOLLM2
    assert len(smollm2.linears()) == 210
    assert smollm2.context_length == 8192


@pytest.mark.model
def test_smollm2_answers_as_its_gguf_does(smollm2):
    """The expected text was produced by the GGUF file itself, loaded with ``gguf_file=``."""
    turns = [{"role": "user", "content": "How many legs do two dogs have?"}]
    batch = smollm2.tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = smollm2.module.generate(**batch, max_new_tokens=24, do_sample=False)
    reply = smollm2.tokenizer.decode(out[0, batch["input_ids"].shape[1] :])
    assert reply == "Two dogs have four legs.<|im_end|>"


@pytest.mark.model
def test_smollm2_keeps_its_tokenizer(smollm2):
    text = "How warm is 80 F? 1234567 naïve 😀 \n\n  x"
    ids = smollm2.tokenizer(text).input_ids
    assert smollm2.tokenizer.decode(ids) == text
    assert smollm2.tokenizer.convert_ids_to_tokens(ids)[:8] == [
        "How",
        "Ġwarm",
        "Ġis",
        "Ġ",
        "8",
        "0",
        "ĠF",
        "?",
    ]
    assert smollm2.tokenizer.eos_token == "<|im_end|>"
    prompt = smollm2.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.model
def test_smollm2_has_its_fingerprint_under_another_path_and_precision(smollm2, tmp_path):
    copy = shutil.copytree(weights.resolve("smollm2-135m"), tmp_path / "elsewhere")
    assert load(copy, dtype="bfloat16").fingerprint == smollm2.fingerprint


@pytest.mark.model
def test_minilm_tells_meanings_apart(minilm):
    vectors = minilm.encode(["cats", "kittens", "tax report"])
    assert vectors.shape == (3, 384)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    assert vectors[0] @ vectors[1] > 0.6 > 0.3 > vectors[0] @ vectors[2]
    assert minilm.encode([]).shape == (0, 384)
    assert minilm.fingerprint == MINILM
    torch.testing.assert_close(minilm.encode(["tax report"])[0], vectors[2], atol=1e-5, rtol=0)


@pytest.mark.model
def test_an_embedder_serves_many_threads(minilm):
    shared = SentenceEmbedder("minilm")
    texts = [f"text {number} " + "word " * number for number in range(8)]
    found: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        found[number] = shared.encode([texts[number]])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = minilm.encode(texts)
    for number in range(8):
        torch.testing.assert_close(found[number][0], expected[number], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "change", [{"rms_norm_eps": 0.5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}]
)
def test_what_changes_the_function_changes_the_fingerprint(change):
    model = tiny_language_model()
    before = fingerprint_of(model.module)
    for key, value in change.items():
        setattr(model.module.config, key, value)
    assert fingerprint_of(model.module) != before
