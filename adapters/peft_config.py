"""What ``adapter_config.json`` of a PEFT LoRA may say, and what it means for the weights.

    s = alpha / r              the scale of a module's update
    s = alpha / sqrt(r)        with use_rslora
    r, alpha                   lora_alpha and r, or the value of the first entry of rank_pattern or
                               alpha_pattern whose regular expression ends the module's path

Fields that would change the result in any other way are refused by name, and so are fields this SDK has
never heard of as soon as they are set: a new variant of LoRA must not load as if it were the plain one.
"""

import logging
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from persona_sdk.errors import IncompatibleAdapterError, UnsupportedAdapterError

logger = logging.getLogger("persona_sdk.adapters.peft_config")

RESAVE = "Merge it or convert it to a plain LoRA (peft.convert_to_lora), save that, and load it again."

# Fields that are honoured below, or that matter only while training.
_UNDERSTOOD = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
_REASONS = {
    "use_dora": "DoRA rescales the base weight",
    "lora_bias": "it adds a bias to B",
    "modules_to_save": "it replaces whole modules of the base model",
    "trainable_token_indices": "it replaces rows of the token embedding",
    "layer_replication": "it changes the number of layers",
    "alora_invocation_tokens": "aLoRA is active for a part of the tokens only",
    "megatron_config": "it belongs to Megatron's parallel layers",
    "target_parameters": "it updates bare parameters, not linear maps",
    "use_qalora": "QALoRA pools the input",
    "use_bdlora": "its factors are block-diagonal",
    "kasa_config": "KaSA truncates the base weight",
}
_HARMLESS_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


def refuse_variants(config: Mapping[str, Any]) -> None:
    """Refuse every field that would change the result and is not honoured, known to us or not.

    Raises:
        UnsupportedAdapterError: names the field and the reason.
    """
    if str(config.get("peft_type")).upper() != "LORA":
        raise UnsupportedAdapterError(
            f"The adapter is of peft type {config.get('peft_type')!r}.", hint=f"Expected 'LORA'. {RESAVE}"
        )
    for field, value in config.items():
        if value and (field not in _UNDERSTOOD or (field == "bias" and value != "none")):
            if field == "megatron_core" and not config.get("megatron_config"):
                continue  # peft writes the name of the package even where it is not used
            reason = _REASONS.get(field, "it is not a plain LoRA" if field != "bias" else "it trains biases")
            raise UnsupportedAdapterError(
                f"The adapter sets {field}={value!r:.80}: {reason}.", hint=f"Expected a plain LoRA. {RESAVE}"
            )
    init = config.get("init_lora_weights", True)
    if (init.lower() if isinstance(init, str) else init) not in _HARMLESS_INITS:
        raise UnsupportedAdapterError(
            f"The adapter was initialised with {init!r}, which changes the base weights it belongs to.",
            hint="Save it with peft's path_initial_model_for_weight_conversion, which makes it a plain LoRA.",
        )


def check_targets(config: Mapping[str, Any], modules: Sequence[str], available: Collection[str]) -> None:
    """Check that ``target_modules`` select every module that has weights.

    Where they do not, peft would skip those weights; here that is an error, since either may be the mistake.
    Modules that are selected and have no weights are logged: there the base model stays as it is.

    Args:
        config: the parsed ``adapter_config.json``.
        modules: paths of the modules with weights.
        available: paths of all linear maps of the base model, as far as it is known.

    Raises:
        IncompatibleAdapterError: a module is not selected, or the selection is malformed.
    """
    targets = config.get("target_modules")
    if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
        return
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    fields = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    try:
        selector = LoraConfig(**{name: config[name] for name in fields if config.get(name) is not None})
        strangers = [module for module in modules if not check_target_module_exists(selector, module)]
        absent = [m for m in available if m not in modules and check_target_module_exists(selector, m)]
    except (re.error, TypeError, ValueError) as error:
        raise IncompatibleAdapterError(
            f"target_modules is {targets!r:.80}: {error}.",
            hint="Expected module names or one regular expression.",
        ) from error
    if strangers:
        raise IncompatibleAdapterError(
            f"The adapter has weights for {strangers[0]!r}, which its target_modules do not name.",
            hint="Weights and adapter_config.json must come from one training run.",
        )
    if absent:
        logger.warning("%d targeted modules have no weights and stay as in the base model.", len(absent))


def folded(config: Mapping[str, Any], module: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The pair in float32 with the module's scale in B.

    Raises:
        IncompatibleAdapterError: rank or alpha are no numbers, or the rank is not that of the weights.
    """
    rank = _number(_by_pattern(config, "rank_pattern", module, config.get("r")), "r", module)
    alpha = _number(
        _by_pattern(config, "alpha_pattern", module, config.get("lora_alpha")), "lora_alpha", module
    )
    if rank != A.shape[0] or rank < 1:
        raise IncompatibleAdapterError(
            f"Module {module!r} has rank {A.shape[0]} but adapter_config.json says {rank:g}.",
            hint="Weights and adapter_config.json must come from one training run.",
        )
    factor = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return A.to(torch.float32), B.to(torch.float32) if factor == 1 else B.to(torch.float32) * factor


def _by_pattern(config: Mapping[str, Any], field: str, module: str, default: Any) -> Any:
    """The value of the first pattern that ends the module's path, as peft's ``get_pattern_key`` finds it."""
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise IncompatibleAdapterError(f"{field} is {patterns!r:.80}.", hint="Expected an object.")
    try:
        return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)
    except re.error as error:
        raise IncompatibleAdapterError(
            f"{field} holds a bad regular expression: {error}.", hint="Expected module names or expressions."
        ) from error


def _number(value: Any, field: str, module: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise IncompatibleAdapterError(
            f"{field} of module {module!r} is {value!r:.80}.", hint="Expected a finite number."
        )
    return value
