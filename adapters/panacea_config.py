"""The options of a Panacea adapter: its shape, its objective, the law of λ, and how it is trained."""

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from persona_sdk.adapters.aggregation import Aggregation
from persona_sdk.adapters.preference_data import Objective
from persona_sdk.adapters.svd_lora import Shape
from persona_sdk.adapters.training import TrainingOptions

_TAKEN = frozenset({"self", "weights"})  # arguments of `prefer` and `steer`


class PanaceaConfig(TrainingOptions):
    """The shape of the adapter and how it is trained."""

    dimensions: tuple[str, ...] = Field(min_length=2, description="names of the preference dimensions")
    rank: int = Field(8, ge=1, description="directions that are the same for every preference")
    preference_rank: int = Field(1, ge=1, description="directions of each dimension")
    scale_per_dimension: bool = False
    init: Literal["orthonormal", "normal"] = "orthonormal"
    alpha: float | None = Field(
        None, gt=0, description="None: 512 for init='normal', as ports of the paper; 16 * rank otherwise"
    )
    target_modules: Literal["all"] | tuple[str, ...] = Field(
        "all", description="ends of module paths, such as 'q_proj'; or every linear map"
    )
    orthogonality_weight: float = Field(0.0, ge=0, description="of AdaLoRA's penalty on U and V")
    train_scale: bool = Field(True, description="false keeps s at 0: the control without any preference")

    objective: Objective = "sft"
    aggregation: Aggregation = "linear"
    ideal: tuple[float, ...] | None = Field(
        None, description="z of Tchebycheff, in the unit of J (nats a reply for SFT); None is 0"
    )
    smoothing: float = Field(
        0.1, gt=0, description="of smooth_tchebycheff, in the unit of the loss (about nats a token for SFT)"
    )
    preference_sampling: Literal["batch", "example"] = Field(
        "batch", description="one λ for a whole optimizer step, as in the paper, or one for every example"
    )
    sampled_objective: bool = Field(
        False, description="one objective i ~ λ an example instead of all m; for the linear aggregation"
    )
    concentration: float = Field(1.0, gt=0, description="of the Dirichlet distribution of λ")
    vertex_probability: float = Field(0.2, ge=0, le=1, description="that λ is a vertex instead")
    fixed_preference: tuple[float, ...] | None = Field(
        None, description="train at this λ alone: one adapter for one preference, to compare with"
    )

    beta: float = Field(0.1, gt=0, description="of DPO")
    kl: float = Field(0.05, ge=0, description="weight of the divergence from the base; objective='reward'")
    samples_per_prompt: int = Field(4, ge=2, description="replies an advantage is taken over; 'reward'")
    max_new_tokens: int = Field(24, ge=1, description="of a sampled reply; 'reward'")
    per_device_eval_batch_size: int = Field(16, ge=1, description="rows at once where nothing is learned")
    eval_steps: int = Field(25, ge=1, description="steps between two evaluations of held-out data")
    early_stopping_patience: int | None = Field(3, ge=1, description="evaluations without a gain; None: all")

    base_model_name_or_path: str = Field("", description="filled in by train; written into PEFT folders")
    fan_in_fan_out: bool = Field(False, description="filled in by train; for PEFT: the base uses Conv1D")

    learning_rate: float = Field(2e-3, gt=0)
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        names = self.dimensions
        if len(set(names)) < len(names) or not all(map(str.isidentifier, names)) or _TAKEN & set(names):
            raise ValueError(
                f"dimensions {names} must be different names such as 'concise', none of them "
                f"{' or '.join(sorted(_TAKEN))}"
            )
        if self.aggregation != "linear" and self.preference_sampling == "example":
            raise ValueError("a mean of minima is no minimum of means: use 'batch', or 'linear'")
        if self.aggregation == "linear" and self.ideal is not None:
            raise ValueError("ideal has no effect with aggregation='linear'")
        if self.objective == "reward" and self.aggregation != "linear":
            raise ValueError(
                "rewards have no known ideal point: objective='reward' needs aggregation='linear'"
            )
        if self.sampled_objective and (self.aggregation != "linear" or self.objective == "reward"):
            raise ValueError(
                "sampled_objective is unbiased for 'sft' and 'dpo' with aggregation='linear' only"
            )
        fixed = self.fixed_preference
        if fixed is not None and (
            len(fixed) != len(names) or min(fixed) < 0 or not math.isclose(math.fsum(fixed), 1)
        ):
            raise ValueError(f"fixed_preference {fixed} is no preference vector over {len(names)} dimensions")
        if self.ideal is not None and len(self.ideal) != len(names):
            raise ValueError(f"ideal has {len(self.ideal)} numbers for {len(names)} dimensions")
        return self

    @property
    def multiplier(self) -> float:
        """``c = alpha / rank``."""
        default = 512.0 if self.init == "normal" else 16.0 * self.rank
        return (default if self.alpha is None else self.alpha) / self.rank

    @property
    def shape(self) -> Shape:
        """Sizes of the factors."""
        return Shape(
            rank=self.rank,
            dimensions=len(self.dimensions),
            preference_rank=self.preference_rank,
            scale_per_dimension=self.scale_per_dimension,
            multiplier=self.multiplier,
        )
