"""The forward pass of any transformers causal LM: its own modules, our keys and values, hooks for branches.

Packed tokens are spread to one length, padded on the left, so that every row's last token stands in the
last column:

    ids      | pad pad tok tok |      positions count from the row's own start, keys and values go to the
             | tok tok tok tok |      token pool, and the mask lets a token see its row up to itself
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from persona_sdk.engine.forward.attention import gathered
from persona_sdk.engine.forward.base import Branches, embedded
from persona_sdk.engine.forward.batch import PackedBatch
from persona_sdk.engine.forward.pool import LayerShape, TokenPool
from persona_sdk.engine.low_rank.sites import Site, single_sites
from persona_sdk.engine.uploads import upload
from persona_sdk.errors import ModelError
from persona_sdk.models import LanguageModel


class GeneralForward:
    """See the module's docstring. Holds the model's lock for the length of a pass."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self.capturable = False  # what a model's own modules do is not known
        self.sites = single_sites(model.linear_shapes())
        self.cache_dtype = model.dtype
        self.layers = _probe(model)
        self._branches: Branches | None = None
        with model.lock:  # not while a training run has its own layers in the module tree
            linears = model.linears()
            self._handles = [
                linears[site.modules[0].path].register_forward_hook(self._hook_for(site))
                for site in self.sites
            ]

    def spread(self, lengths: tuple[int, ...]) -> tuple[int, ...]:
        """Padded to the longest."""
        return (max(lengths),) * len(lengths)

    def close(self) -> None:
        """Take the hooks off the base model."""
        with self._model.lock:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    def __call__(
        self, batch: PackedBatch, pool: TokenPool, branches: Branches | None, *, every: bool = False
    ) -> Float[Tensor, "outputs vocab"]:
        """See `Forward`."""
        layout = _Padded(batch)
        inputs: dict[str, Any] = {}
        with self.applying(branches):
            if batch.vectors:
                embeds = embedded(self._model.module.get_input_embeddings(), batch)
                inputs["inputs_embeds"] = layout.spread(embeds)
            else:
                inputs["input_ids"] = layout.spread(batch.tokens)
            out = self._model.module(
                **inputs,
                attention_mask=self._masks(layout),
                position_ids=layout.positions,
                past_key_values=Cache(layers=[_PoolLayer(layout, pool, i) for i in range(len(self.layers))]),
                use_cache=True,
                logits_to_keep=0 if every else 1,
            ).logits
        wanted = upload(torch.tensor(batch.wanted, dtype=torch.long), out.device)
        logits: Tensor = out[layout.real] if every else out[wanted, -1]
        return logits.float()

    def _masks(self, layout: "_Padded") -> Any:
        config = self._model.module.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        if kinds is None:
            kinds = ["sliding_attention" if window else "full_attention"]
        made = {
            kind: layout.mask(window if kind == "sliding_attention" else None, self._model.dtype)
            for kind in set(kinds)
        }
        return made if len(made) > 1 else next(iter(made.values()))

    @contextmanager
    def applying(self, branches: Branches | None) -> Iterator[None]:
        """Add these branches to whatever the model computes inside the block. Waits for the model's lock."""
        with self._model.lock:
            self._branches = branches
            try:
                yield
            finally:
                self._branches = None

    def _hook_for(self, site: Site) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if self._branches is not None:
                x, y = inputs[0], output
                # Some architectures flatten rows and tokens themselves; the sites see packed tokens anyway.
                self._branches.add(site, x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1]))

        return hook


class _Padded:
    """Packed tokens as rows of one length."""

    def __init__(self, batch: PackedBatch) -> None:
        self.batch = batch
        longest, device = max(batch.lengths), batch.tokens.device
        lengths = upload(torch.tensor(batch.lengths), device)
        columns = torch.arange(longest, device=device)
        self.real: Bool[Tensor, "rows longest"] = columns >= longest - lengths[:, None]
        self.positions: Int[Tensor, "rows longest"] = self.spread(batch.positions)

    def spread(self, packed: Tensor) -> Tensor:
        """``[tokens, ...]`` -> ``[rows, longest, ...]``, zeros in front."""
        if self.batch.is_decode:
            return packed[:, None]
        out = packed.new_zeros(*self.real.shape, *packed.shape[1:])
        out[self.real] = packed
        return out

    def mask(self, window: int | None, dtype: torch.dtype) -> Float[Tensor, "rows 1 longest width"]:
        """Additive: zero where a token may look, the lowest number elsewhere."""
        columns = torch.arange(self.batch.tables.shape[1], device=self.real.device)
        visible = columns <= self.positions[:, :, None]
        if window is not None:
            visible &= columns > self.positions[:, :, None] - window
        zeros = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return zeros.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


class _PoolLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of the token pool, as a transformers cache layer."""

    is_croppable = False

    def __init__(self, layout: _Padded, pool: TokenPool, layer: int) -> None:
        super().__init__()
        self.is_initialized = True
        self._layout, self._pool, self._layer = layout, pool, layer

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The pool exists."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new tokens, and return every row's keys and values, padded to one width."""
        batch, real = self._layout.batch, self._layout.real
        key, value = key_states.transpose(1, 2)[real], value_states.transpose(1, 2)[real]
        self._pool.write(self._layer, batch.slots, key, value)
        return gathered(batch, self._pool, self._layer, key_states.dtype)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Key length and offset. Masks are given ready made; this answers who asks anyway."""
        return self._layout.batch.tables.shape[1], 0

    def get_seq_length(self) -> int:
        """Positions before this pass, of the longest row."""
        return self._layout.batch.tables.shape[1] - self._layout.real.shape[1]

    def get_max_length(self) -> int:
        """No maximum."""
        return -1


def _probe(model: LanguageModel) -> tuple[LayerShape, ...]:
    """What one token keeps in every layer, found by running one token."""
    from transformers import DynamicCache

    cache = DynamicCache()
    with model.lock, torch.inference_mode():
        model.module(
            input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device),
            attention_mask=torch.ones(1, 1, dtype=torch.long, device=model.device),
            past_key_values=cache,
            use_cache=True,
        )
    shapes = []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.ndim != 4:
            break
        shapes.append(LayerShape(keys.shape[1], keys.shape[-1], values.shape[-1]))
    if not shapes or len(shapes) != len(cache.layers):
        raise ModelError(
            f"{type(model.module).__name__} keeps no keys and values per token in every layer.",
            hint="The engine runs attention models; state-space and hybrid models are not supported.",
        )
    return tuple(shapes)
