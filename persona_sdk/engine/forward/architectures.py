"""What the fused forward pass knows about architectures: all of it is in this file.

A model qualifies when its decoder layer is the one of Llama: pre-norm attention with rotary positions and
grouped heads, then a pre-norm gated MLP. `blocks_of` reads its parts; everything else takes the general
path. What the table claims is checked against the model itself when an engine is made.
"""

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

# Decoder layers of these model types are Llama's, with or without q/k/v biases and q/k norms.
LLAMA_LIKE = frozenset({"llama", "mistral", "qwen2", "qwen3"})


@dataclass(frozen=True)
class Block:
    """One decoder layer. Paths are the base model's module paths, by which adapters name them."""

    path: str
    input_norm: "Norm"
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    q_norm: "Norm | None"
    k_norm: "Norm | None"
    post_norm: "Norm"
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    activation: Any
    scale: float


@dataclass(frozen=True)
class Blocks:
    """A whole decoder: token embeddings, layers, final norm, output head, rotary table.

    ``reads_back`` says that the rotary table looks at the positions on the host.
    Tensors are the model's own, modules are not: a training run may take the module tree apart meanwhile.
    """

    embed: nn.Module
    layers: tuple[Block, ...]
    norm: "Norm"
    head: nn.Linear
    rotary: nn.Module
    heads: int
    kv_heads: int
    head_dim: int
    reads_back: bool


def blocks_of(module: Any) -> Blocks | None:
    """The parts of a Llama-like causal LM; None for any other."""
    config = module.config
    if config.model_type not in LLAMA_LIKE or "sliding_attention" in (
        getattr(config, "layer_types", None) or ()
    ):
        return None
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return None
    decoder = module.model
    layers = tuple(_block(f"model.layers.{i}", layer) for i, layer in enumerate(decoder.layers))
    return Blocks(
        embed=_shared(decoder.embed_tokens),
        layers=layers,
        norm=Norm.of(decoder.norm),
        head=module.lm_head,
        rotary=copy.deepcopy(decoder.rotary_emb),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=layers[0].q.out_features // config.num_attention_heads,
        # It computes its frequencies anew when positions pass what it has seen.
        reads_back="dynamic" in str(getattr(decoder.rotary_emb, "rope_type", "")),
    )


def _shared(embed: Any) -> nn.Module:
    """Token embeddings over the same tensor."""
    weight = embed.weight.detach()
    return nn.Embedding(weight.shape[0], weight.shape[1], _weight=weight)


def _block(path: str, layer: Any) -> Block:
    attention, mlp = layer.self_attn, layer.mlp
    return Block(
        path=path,
        input_norm=Norm.of(layer.input_layernorm),
        q=attention.q_proj,
        k=attention.k_proj,
        v=attention.v_proj,
        o=attention.o_proj,
        q_norm=Norm.of(attention.q_norm) if hasattr(attention, "q_norm") else None,
        k_norm=Norm.of(attention.k_norm) if hasattr(attention, "k_norm") else None,
        post_norm=Norm.of(layer.post_attention_layernorm),
        gate=mlp.gate_proj,
        up=mlp.up_proj,
        down=mlp.down_proj,
        activation=copy.deepcopy(mlp.act_fn),
        scale=float(attention.scaling),
    )


@dataclass(frozen=True)
class Norm:
    """An RMS norm."""

    weight: Tensor
    epsilon: float

    @classmethod
    def of(cls, module: Any) -> "Norm":
        """That of a module."""
        return cls(module.weight.detach(), float(module.variance_epsilon))
