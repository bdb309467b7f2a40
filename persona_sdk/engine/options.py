"""What an engine may use: rows, tokens per step, bytes per tier."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from persona_sdk.config import FrozenConfig
from persona_sdk.engine.low_rank.tiers import TierOptions
from persona_sdk.engine.prefix.reuse import ReuseOptions


class EngineOptions(FrozenConfig):
    """Limits of one engine. Bytes are budgets, not reservations: memory grows with use.

    Args are documented by their fields; the defaults suit a laptop and a small model.
    """

    max_rows: int = Field(32, ge=1, description="rows that generate at the same time")
    queue_limit: int = Field(4096, ge=1, description="requests that may wait; more are refused")
    prefill_tokens: int = Field(256, ge=1, description="prompt tokens per step, so that nobody stalls")
    max_wait: int = Field(200, ge=1, description="steps after which waiting beats every preference")
    kv_bytes: int = Field(2 * 2**30, ge=1, description="keys and values of the rows")
    prefix_bytes: int = Field(512 * 2**20, ge=0, description="kept prefixes, in host memory; 0 keeps none")
    block_reuse: ReuseOptions | None = Field(
        None,
        description="reuse memory blocks in any order. Approximate: tokens then depend on these options too, "
        "see docs/prefix.md. None: every prompt is computed exactly",
    )
    block_bytes: int = Field(256 * 2**20, ge=0, description="kept memory blocks, in host memory")
    device_bytes: int = Field(2**30, ge=1, description="adapters in device slots")
    host_bytes: int = Field(2**30, ge=0, description="adapters in host memory")
    disk_bytes: int = Field(4 * 2**30, ge=0, description="adapters as flat files in `flat_folder`")
    flat_folder: Path | None = Field(
        None, description="of this process alone; emptied at open and close. None: no flat files"
    )
    fused: bool = Field(True, description="use the fused forward pass where the architecture is known")
    kernel: Literal["auto", "indexed", "dense", "batched", "segments", "triton"] = Field(
        "auto", description="of the low-rank branch; auto takes the cheapest by this machine's measured costs"
    )
    branch_precision: Literal["auto", "fastest", "float32", "bfloat16"] = Field(
        "auto",
        description="in which adapters are kept and read. fastest: as measured on this machine; auto: "
        "float32 beside a float32 base, else fastest. See docs/precision.md",
    )
    graphs: bool = Field(
        True,
        description="on CUDA, run decode steps as CUDA graphs: those of rows without adapters, and with "
        "kernel='triton' all; no effect on CPUs",
    )
    calibrate: bool = Field(True, description="choose kernels by measuring this machine once")

    @model_validator(mode="after")
    def _blocks_are_picked_without_a_probe(self) -> Self:
        if self.block_reuse is not None and self.block_reuse.pick != "first":
            # A probe is a pass over a whole prompt, for which a step of bounded length has no place, and it
            # was not found to be worth its time (docs/prefix.md).
            raise ValueError('block_reuse.pick must be "first" in an engine')
        return self

    def tiers(self) -> TierOptions:
        """The budgets of the adapter tiers."""
        return TierOptions(
            device_bytes=self.device_bytes,
            host_bytes=self.host_bytes,
            disk_bytes=self.disk_bytes,
            flat_folder=self.flat_folder,
        )
