"""Where low-rank branches attach: the narrow contract between the forward pass and the kernels.

A *site* is one linear map as the forward pass executes it: one input, one output. It carries one module
of the base model, or several that share their input and stand side by side in the output, as a fused
q/k/v projection does. Low-rank factors are always named by module; a site says where each module's
columns are.

    output of a site:   | q_proj ........ | k_proj .. | v_proj .. |
                          column 0          576         768
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class SiteModule:
    """One module of a site: its path in the base model, its width and its first column in the output."""

    path: str
    d_out: int
    column: int


@dataclass(frozen=True)
class Site:
    """One linear map of the forward pass. `index` is its place in the model, from 0."""

    index: int
    d_in: int
    modules: tuple[SiteModule, ...]

    @property
    def width(self) -> int:
        """Columns of the site's output."""
        return sum(module.d_out for module in self.modules)


def single_sites(shapes: Mapping[str, tuple[int, int]]) -> tuple[Site, ...]:
    """One site per module, for forward passes that fuse nothing. `shapes` gives ``(d_in, d_out)``."""
    return tuple(
        Site(index, d_in, (SiteModule(path, d_out, 0),))
        for index, (path, (d_in, d_out)) in enumerate(shapes.items())
    )
