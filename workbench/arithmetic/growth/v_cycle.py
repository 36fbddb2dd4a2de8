"""The maps of a V-cycle: a model made smaller by means of its units, and larger again by copies of them.

F averages units that are put together, T gives each its copy back, and F T = 1: what is made larger and
smaller again is what it was. So it is with R and G, which do the same to blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def coalescing(large: int, small: int) -> Tensor:
    """F (small, large): unit i of the small model is the mean of i and i + small, as far as there are any;
    every row sums to one (Zou et al. 2024, eq. 3, and the authors' default).
    """
    joined = torch.cat([torch.eye(small), torch.eye(small, large - small)], 1)
    return joined / joined.sum(1, keepdim=True)


def copying(coalesced: Tensor) -> Tensor:
    """T (large, small) of F, or G of R: its transpose with rows that sum to one."""
    turned = coalesced.T
    return turned / turned.sum(1, keepdim=True)


def merging_blocks(large: int, small: int) -> Tensor:
    """R (small, large): each block of the small model is the mean of large / small neighbours."""
    each = large // small
    return torch.eye(small).repeat_interleave(each, 1) / each


def smaller(weight: Tensor, out: Tensor, inside: Tensor) -> Tensor:
    """A matrix (out, in) between coalesced units: F_out W T_in."""
    return out @ weight @ copying(inside)


def larger(weight: Tensor, out: Tensor, inside: Tensor) -> Tensor:
    """The same the other way: T_out W F_in, which answers what W answered on copies of its inputs."""
    return copying(out) @ weight @ inside


def interpolated(before: Tensor, after: Tensor, alpha: float = 0.25) -> Tensor:
    """(1 - alpha) before + alpha after: the large model's own weights keep its copies from staying alike."""
    return (1 - alpha) * before + alpha * after
