"""Many objectives into one number to maximise, for one preference vector.

    linear               g = Σ_i λ_i J_i
    tchebycheff          g = min_i λ_i (J_i - z_i)                                    z: ideal point, J <= z
    smooth_tchebycheff   g = -μ log Σ_i exp(-λ_i (J_i - z_i) / μ)  ->  tchebycheff as μ -> 0

| symbol | argument     | shape  |
|--------|--------------|--------|
| J      | ``values``   | [n, m] |
| λ      | preference   | [n, m] |
| z      | ``ideal``    | [m]    |
| μ      | ``smoothing``| number |

With J <= 0 (log-likelihoods, DPO) z = 0 is an ideal point. With J above z the minimum goes to a term of
weight 0 and a vertex would learn nothing at all, so that is an error. Terms of weight 0 are left out of the
smooth minimum: they would only add a constant.

References: Zhong et al. 2024, Panacea, eqs. 6 and 7; Lin et al. 2024, smooth Tchebycheff, arXiv 2402.19078.
"""

from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from persona_sdk.errors import AdapterError

Aggregation: TypeAlias = Literal["linear", "tchebycheff", "smooth_tchebycheff"]


def aggregate(
    values: Float[Tensor, "n m"],
    preference: Float[Tensor, "n m"],
    how: Aggregation = "linear",
    *,
    ideal: Float[Tensor, " m"] | None = None,
    smoothing: float = 0.1,
) -> Float[Tensor, " n"]:
    """The aggregated objective of each row, to be maximised.

    Raises:
        AdapterError: a Tchebycheff aggregation with an objective above the ideal point.
    """
    if how == "linear":
        return (preference * values).sum(-1)
    # A term of weight 0 is 0, which no other term exceeds: it is never the minimum, whatever its value.
    distance = (values if ideal is None else values - ideal).masked_fill(preference == 0, 0.0)
    if bool((distance.detach() > 0).any()):
        raise AdapterError(
            f"An objective is {float(distance.detach().max()):.3g} above its ideal value.",
            hint="Give an ideal point that no objective exceeds, or use the linear aggregation.",
        )
    terms = preference * distance
    if how == "tchebycheff":
        return terms.amin(-1)
    counted = (-terms / smoothing).masked_fill(preference == 0, float("-inf"))
    return -smoothing * torch.logsumexp(counted, -1)
