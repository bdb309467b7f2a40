"""The forward pass of Llama-like models without what is not arithmetic.

    h = x + o(attention(rope(qkv(norm(x)))))          qkv and gate/up: one product each
    y = h + down(act(gate(norm(h))) * up(norm(h)))    weights packed once for this CPU's kernels

Works on packed tokens: no padding, no mask, no cache concatenation, no module calls. Weights are copied
when packed (`FusedForward.bytes` says how much), so training on the module tree does not disturb it.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from persona_sdk.engine.forward.architectures import Block, Blocks, Norm
from persona_sdk.engine.forward.attention import attend, decode_attention, rotate
from persona_sdk.engine.forward.base import Branches, embedded
from persona_sdk.engine.forward.batch import PackedBatch
from persona_sdk.engine.forward.norms import rms_norm
from persona_sdk.engine.forward.pool import LayerShape, TokenPool
from persona_sdk.engine.low_rank.sites import Site, SiteModule
from persona_sdk.engine.stored import STORED, numbers
from persona_sdk.packed import PackedLinear


class FusedForward:
    """See the module's docstring. Args: the parts of the model (`architectures.blocks_of`)."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        self._device = blocks.head.weight.device
        self._layers = [_Layer(block, index) for index, block in enumerate(blocks.layers)]
        self._head = PackedLinear.of(blocks.head)
        self.capturable = not blocks.reads_back
        self.sites = tuple(site for layer in self._layers for site in layer.sites)
        self.layers = (LayerShape(blocks.kv_heads, blocks.head_dim, blocks.head_dim),) * len(blocks.layers)
        weights = blocks.head.weight
        # The compiled attention reads float32 and bfloat16; on other devices there is none.
        plain = weights.device.type == "cpu" and weights.dtype not in STORED
        self.cache_dtype = torch.float32 if plain else weights.dtype

    def spread(self, lengths: tuple[int, ...]) -> tuple[int, ...]:
        """As packed."""
        return lengths

    def close(self) -> None:
        """Nothing was put on the base model."""

    @property
    def bytes(self) -> int:
        """Memory of the packed copies."""
        linears = [linear for layer in self._layers for linear in layer.linears]
        return sum(linear.bytes for linear in (*linears, self._head))

    def __call__(
        self, batch: PackedBatch, pool: TokenPool, branches: Branches | None, *, every: bool = False
    ) -> Float[Tensor, "outputs vocab"]:
        """See `Forward`."""
        blocks = self._blocks
        x = embedded(blocks.embed, batch)
        cos, sin = (table[0] for table in blocks.rotary(x[None], batch.positions[None]))
        attention = _Attention(blocks, batch, pool, cos, sin)
        for layer in self._layers:
            x = layer(x, attention, branches)
        if not every:
            x = x.index_select(0, batch.last) if len(batch.wanted) < len(x) else x
        return self._head(_normed(blocks.norm, x)).float()


class _Layer:
    """One decoder layer: four products, four sites."""

    def __init__(self, block: Block, index: int) -> None:
        self._block, self._index = block, index
        groups: tuple[tuple[tuple[nn.Linear, ...], tuple[str, ...]], ...] = (
            ((block.q, block.k, block.v), ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ((block.o,), ("self_attn.o_proj",)),
            ((block.gate, block.up), ("mlp.gate_proj", "mlp.up_proj")),
            ((block.down,), ("mlp.down_proj",)),
        )
        self.linears = tuple(PackedLinear.of(*linears) for linears, _ in groups)
        self.sites = tuple(
            _site(4 * index + place, linears, [f"{block.path}.{name}" for name in names])
            for place, (linears, names) in enumerate(groups)
        )

    def __call__(
        self, x: Float[Tensor, "tokens d_model"], attention: "_Attention", branches: Branches | None
    ) -> Float[Tensor, "tokens d_model"]:
        block = self._block
        qkv = self._apply(0, _normed(block.input_norm, x), branches)
        x = self._apply(1, attention(self._index, qkv, block), branches).add_(x)
        gate, up = self._apply(2, _normed(block.post_norm, x), branches).chunk(2, dim=-1)
        return self._apply(3, block.activation(gate).mul_(up), branches).add_(x)

    def _apply(self, place: int, x: Tensor, branches: Branches | None) -> Tensor:
        y = self.linears[place](x)
        if branches is not None:
            branches.add(self.sites[place], x, y)
        return y


class _Attention:
    """Attention of one pass: what all layers share is prepared once."""

    def __init__(self, blocks: Blocks, batch: PackedBatch, pool: TokenPool, cos: Tensor, sin: Tensor) -> None:
        self._heads, self._kv_heads, self._head_dim = blocks.heads, blocks.kv_heads, blocks.head_dim
        self._batch, self._pool, self._cos, self._sin = batch, pool, cos, sin
        compiled = None
        if batch.is_decode and cos.device.type == "cpu":
            compiled = decode_attention(self._head_dim, cos.shape[-1], self._heads // self._kv_heads)
        self._compiled = compiled
        if compiled is not None:
            seen = batch.positions + 1
            self._arrays = [t.contiguous().numpy() for t in (cos.float(), sin.float(), batch.tables, seen)]
            self._out = torch.empty(len(batch.tokens), self._heads * self._head_dim, dtype=pool.dtype)

    def __call__(
        self, layer: int, qkv: Float[Tensor, "tokens width"], block: Block
    ) -> Float[Tensor, "tokens d_model"]:
        heads, kv_heads, dim = self._heads, self._kv_heads, self._head_dim
        split = qkv.view(len(qkv), heads + 2 * kv_heads, dim)
        if block.q_norm is not None and block.k_norm is not None:
            split[:, :heads] = _normed(block.q_norm, split[:, :heads])
            split[:, heads : heads + kv_heads] = _normed(block.k_norm, split[:, heads : heads + kv_heads])
        if self._compiled is None:
            turned = rotate(split[:, : heads + kv_heads], self._cos, self._sin)
            query, key = turned[:, :heads], turned[:, heads:]
            out = attend(
                query, key, split[:, heads + kv_heads :], self._batch, self._pool, layer, block.scale
            )
            return out.reshape(len(qkv), heads * dim)
        cos, sin, tables, seen = self._arrays
        out = self._out
        new, keys, values, into = map(
            numbers, (qkv.to(out.dtype), self._pool.keys[layer], self._pool.values[layer], out)
        )
        self._compiled(new, cos, sin, keys, values, tables, seen, block.scale, kv_heads, into)
        return out.to(qkv.dtype)


def _normed(norm: Norm, x: Tensor) -> Tensor:
    return rms_norm(x, norm.weight, norm.epsilon)


def _site(index: int, linears: Sequence[nn.Linear], paths: Sequence[str]) -> Site:
    modules, column = [], 0
    for linear, path in zip(linears, paths, strict=True):
        modules.append(SiteModule(path, linear.out_features, column))
        column += linear.out_features
    return Site(index, linears[0].in_features, tuple(modules))
