"""A whole composition as one plain PEFT LoRA folder, for engines that know one LoRA per request.

    ΔW = Σᵢ Bᵢ diag(gᵢ) Aᵢ = [B₁ diag(g₁), B₂ diag(g₂), ...] [A₁; A₂; ...]        exact, rank Σ rᵢ

    symbol  field                    shape
    gᵢ      LowRankPatch.gate        [rᵢ]; weight, state and preference are in it
    Aᵢ      "<module>.A" of patch i  [rᵢ, d_in]
    Bᵢ      "<module>.B" of patch i  [d_out, rᵢ], scale folded in

Here, and only here, the gate is folded into B: our engine keeps it apart so that members share their
group's factors. So there is a folder per preference vector, and a new one whenever an adapter changes.

A folder holds adapters only. Parts that are no low-rank patch, and memories pinned into every prompt,
are an error that names them, or with ``partial=True`` are listed in `Materialized.left_out`. Other memories
depend on the message; `Materialized.skipped` counts them. Whoever serves the folder writes the prompt.

The same composition gives the same bytes. `Materialized.version` hashes what the bytes depend on, so it is
known before a tensor is multiplied, and two replicas agree on it without talking.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_sdk import files
from persona_sdk.adapter_composition import UNCHANGED, AdapterComposition, Adjustment, compose_adapters
from persona_sdk.adapters import folders, lowrank, peft_format
from persona_sdk.errors import AdapterError, CompositionError
from persona_sdk.models import LanguageModel
from persona_sdk.plan import CompositionPlan, LowRankPatch
from persona_sdk.tensors import Digest, TensorBundle, low_rank_pairs

if TYPE_CHECKING:
    from persona_sdk.model import PersonaModel

# What vLLM's --max-lora-rank can be. A folder of any rank up to it loads: vLLM pads to it in memory.
MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
SOURCES = "persona_sources"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Materialized:
    """A written folder.

    Args:
        path: the folder.
        version: SHA-256 (hex) of everything its bytes depend on.
        rank: of every module in it.
        origins: the adapters in it, in order.
        left_out: parts that a PEFT folder cannot hold, and pinned memories.
        skipped: see `AdapterComposition`.
    """

    path: Path
    version: str
    rank: int
    origins: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    @property
    def max_lora_rank(self) -> int:
        """The smallest ``--max-lora-rank`` with which vLLM serves the folder."""
        for rank in MAX_LORA_RANKS:
            if self.rank <= rank:
                return rank
        raise CompositionError(
            f"The composition has rank {self.rank}; vLLM serves at most {MAX_LORA_RANKS[-1]}.",
            hint="Attach fewer adapters, or truncate one (persona_sdk.adapters.lowrank.truncate_bundle).",
        )


def materialize(
    model: "PersonaModel",
    persona: str,
    folder: str | Path,
    *,
    groups: Sequence[str] | None = None,
    adjust: Adjustment = UNCHANGED,
    rank: int | None = None,
    partial: bool = False,
) -> Materialized:
    """Write all adapters of a persona and its groups as one PEFT LoRA folder.

    Args:
        model: the open model.
        persona: id of a user or a group.
        folder: new, empty, or an adapter folder to replace.
        groups: only these of its groups; None takes all, as chat does.
        adjust: strengths and preference for this export.
        rank: pad to this rank with zeros, for servers with fixed ranks. vLLM needs none.
        partial: leave out what a PEFT folder cannot hold, and list it, instead of refusing.

    Raises:
        NotFoundError: no such persona, or it is in no such group.
        CompositionError: nothing to write, or a part that a PEFT folder cannot hold.
        InvalidInputError: a family refuses its state or preference; `rank` is too small.
    """
    composition = compose_adapters(
        model.base.fingerprint, model.store, model.adapters, persona, groups=groups, adjust=adjust
    )
    return write(composition, model.base, folder, rank=rank, partial=partial)


def left_out(plan: CompositionPlan) -> tuple[str, ...]:
    """The parts of a plan that a PEFT folder cannot hold, as ``"kind origin"``."""
    return tuple(f"{part.kind} {part.origin}" for part in plan.parts if not isinstance(part, LowRankPatch))


def low_rank_sum(plan: CompositionPlan, tensors: Mapping[Digest, TensorBundle]) -> TensorBundle:
    """All low-rank patches of a plan as one float32 bundle, gates folded into B. Exact; pure.

    Raises:
        CompositionError: the plan has no low-rank patch, or its tensors are not there.
        IncompatibleAdapterError: two patches have different shapes for one module.
    """
    inputs: list[tuple[TensorBundle, Sequence[float]]] = []
    for patch in plan.low_rank:
        if patch.factors not in tensors:
            raise CompositionError(
                f"The factors {patch.factors[:12]} of {patch.origin!r} are missing.",
                hint="Pass the tensors that belong to the plan.",
            )
        factors = tensors[patch.factors]
        wide = {name: tensor.detach().cpu().float() for name, tensor in factors.items()}
        inputs.append((lowrank.pad_rank(wide, patch.rank), patch.gate))
    if not inputs:
        raise CompositionError(
            "There is no low-rank adapter to write.", hint="Attach one, or serve the base model itself."
        )
    return lowrank.concatenate(inputs)


def version_of(composition: AdapterComposition, *, base_name: str, rank: int | None = None) -> str:
    """SHA-256 (hex) of everything the bytes of a folder depend on, versions of libraries excepted."""
    patches = [[patch.factors, patch.gate] for patch in composition.plan.low_rank]
    facts = [_FORMAT, composition.plan.base, base_name, rank, patches, composition.sources]
    return hashlib.sha256(json.dumps(facts, allow_nan=False).encode()).hexdigest()


def write(
    composition: AdapterComposition,
    base: LanguageModel,
    folder: str | Path,
    *,
    base_name: str | None = None,
    rank: int | None = None,
    partial: bool = False,
) -> Materialized:
    """Write a composition as a PEFT LoRA folder; whole or not at all.

    Args:
        composition: what to write.
        base: the base model; its weights are not read.
        folder: new, empty, or an adapter folder to replace.
        base_name: name under which the base is served; None takes its own.
        rank: as for `materialize`.
        partial: as for `materialize`.

    Raises:
        CompositionError: nothing to write, or a part that a PEFT folder cannot hold.
        IncompatibleAdapterError: a patch does not fit the base model.
    """
    plan, absent = composition.plan, _checked(composition, partial)
    bundle = low_rank_sum(plan, composition.tensors)
    if rank is not None:
        bundle = lowrank.pad_rank(bundle, rank)
    shapes = base.linear_shapes()
    peft_format.check_shapes({module: (A, B) for module, A, B in low_rank_pairs(bundle)}, shapes)
    modules = lowrank.modules_of(bundle)
    name = base.name if base_name is None else base_name
    with folders.replace_folder(folder) as fresh:
        peft_format.write(
            fresh,
            bundle,
            base=plan.base,
            base_name=name,
            target_modules=peft_format.short_names(modules, shapes),
            fan_in_fan_out=peft_format.is_transposed(base, modules),
            header={SOURCES: " ".join(composition.sources)},
        )
        _sort_header(fresh / folders.TENSOR_FILE)
    return _described(composition, Path(folder), name, lowrank.rank_of(bundle), rank, absent)


def write_once(
    composition: AdapterComposition,
    base: LanguageModel,
    cache: Path,
    *,
    base_name: str | None = None,
    partial: bool = False,
) -> Materialized:
    """The folder ``cache/<version>``, written if it is not there yet. Arguments and errors as for `write`.

    Folders appear whole, under one rename, and are never changed: readers and writers of other threads and
    processes need no lock.
    """
    absent, name = _checked(composition, partial), base.name if base_name is None else base_name
    target = cache / version_of(composition, base_name=name)
    if not target.is_dir():
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = cache / f".{uuid.uuid4().hex}.new"
        try:
            write(composition, base, fresh, base_name=name, partial=partial)
            os.rename(fresh, target)  # refused when somebody else was first: a folder is there, and full
            files.sync(cache)
        except OSError as error:
            if not target.is_dir():
                raise AdapterError(f"Could not write {target}: {error}.", hint="Check the disk.") from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    rank = sum(patch.rank for patch in composition.plan.low_rank)
    return _described(composition, target, name, rank, None, absent)


def sources_of(folder: Path) -> tuple[Digest, ...]:
    """Digests of the stored adapters that a folder was made from; reads no tensor."""
    from safetensors import safe_open

    with safe_open(folder / folders.TENSOR_FILE, framework="pt") as file:
        header = file.metadata() or {}
    return tuple(header.get(SOURCES, "").split())


def _described(
    composition: AdapterComposition,
    path: Path,
    base_name: str,
    rank: int,
    padded: int | None,
    absent: tuple[str, ...],
) -> Materialized:
    return Materialized(
        path=path,
        version=version_of(composition, base_name=base_name, rank=padded),
        rank=rank,
        origins=tuple(patch.origin for patch in composition.plan.low_rank),
        left_out=absent,
        skipped=composition.skipped,
    )


def _checked(composition: AdapterComposition, partial: bool) -> tuple[str, ...]:
    """What stays out of a folder; an error unless that was agreed to, or if nothing would be left."""
    absent = (*left_out(composition.plan), *composition.pinned)
    if absent and not partial:
        raise CompositionError(
            f"A PEFT folder cannot hold {', '.join(absent)}.",
            hint="Detach them, or pass partial=True and serve them by other means.",
        )
    if not composition.plan.low_rank:
        raise CompositionError(
            "There is no low-rank adapter to write.", hint="Attach one, or serve the base model itself."
        )
    return absent


def _sort_header(path: Path) -> None:
    """Rewrite a safetensors file with its header in order: the library's own order is random.

    Offsets count from the end of the header, so nothing else changes.
    """
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
