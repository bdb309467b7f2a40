"""What a request must satisfy before it is queued: all of it can be told without loading an adapter."""

from collections.abc import Collection, Mapping

from persona_sdk.engine.entries import given_entries, soft_vectors
from persona_sdk.engine.prefix.reuse import check_spans
from persona_sdk.engine.request import Request
from persona_sdk.errors import (
    CompositionError,
    IncompatibleAdapterError,
    InvalidInputError,
    PromptTooLongError,
)
from persona_sdk.models import LanguageModel
from persona_sdk.plan import DecodingRule, LowRankPatch
from persona_sdk.tensors import TensorBundle, low_rank_pairs


def check_request(
    request: Request, model: LanguageModel, capabilities: Collection[str], *, room: bool = True
) -> None:
    """Raise unless an engine with these capabilities can execute the request on this model."""
    _check_parts(request, model, capabilities)
    soft_vectors(request, model.d_model)
    _check_tokens(request, int(model.module.config.get_text_config().vocab_size))
    new = request.plan.options.max_new_tokens
    length = given_entries(request) + len(request.prompt)
    if room and length + new > model.context_length:
        raise PromptTooLongError(
            f"{length} prompt and {new} new tokens do not fit the context of {model.context_length}.",
            hint="Shorten the prompt, drop old turns or ask for fewer new tokens.",
            needed=length + new,
        )


def _check_parts(request: Request, model: LanguageModel, capabilities: Collection[str]) -> None:
    plan = request.plan
    if plan.base != model.fingerprint:
        raise IncompatibleAdapterError(
            f"The plan is for base model {plan.base[:12]}, this one is {model.fingerprint[:12]}.",
            hint="Compose the plan again with the model that is loaded.",
        )
    for part in plan.parts:
        if part.kind not in capabilities:
            raise CompositionError(
                f"This engine cannot execute a {part.kind!r} part ({part.origin!r}).",
                hint=f"It executes: {', '.join(sorted(capabilities))}.",
            )
        named = next(
            (getattr(part, name) for name in ("factors", "vectors", "cache") if hasattr(part, name)), None
        )
        if named is not None and named not in request.tensors:
            raise CompositionError(
                f"The request does not carry the tensors {named[:12]} of {part.origin!r}.",
                hint="Pass the contributions' tensors along with the plan.",
            )


def _check_tokens(request: Request, vocab: int) -> None:
    if not 0 <= request.seed < 2**63:
        raise InvalidInputError(f"The seed is {request.seed}.", hint="Expected an integer in [0, 2**63).")
    rules: tuple[DecodingRule, ...] = request.plan.of(DecodingRule)
    named = (*request.prompt, *(token for rule in rules for token, _ in rule.bias))
    stray = [token for token in named if not 0 <= token < vocab]
    if not request.prompt or stray:
        raise InvalidInputError(
            f"Token ids {stray[:3]} are outside the vocabulary." if stray else "The prompt has no tokens.",
            hint=f"Expected at least one id in [0, {vocab}).",
        )
    check_spans(request.blocks, len(request.prompt))


def check_patch(patch: LowRankPatch, bundle: TensorBundle, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise `IncompatibleAdapterError` unless every factor fits the module it names."""
    for module, A, B in low_rank_pairs(bundle):
        expected = shapes.get(module)
        if expected is None:
            raise IncompatibleAdapterError(
                f"{patch.origin!r} patches {module!r}, which this model does not have.",
                hint=f"Modules here look like {next(iter(shapes), 'none')!r}.",
            )
        if (A.shape[1], B.shape[0]) != expected or A.shape[0] > patch.rank:
            raise IncompatibleAdapterError(
                f"{patch.origin!r} has A {tuple(A.shape)} and B {tuple(B.shape)} for {module!r}, plan rank "
                f"{patch.rank}.",
                hint=f"This model expects d_in, d_out = {expected} and a rank of at most the plan's.",
            )
