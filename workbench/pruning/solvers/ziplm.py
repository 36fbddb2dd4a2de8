"""Structured OBS on a consumer matrix (Kurtic, Frantar and Alistarh 2023, ZipLM):
remove units of columns, refit the rest.

    rho_S = sum over rows of W_S ([H^-1]_SS)^-1 W_S^T,   W <- W - W_S ([H^-1]_SS)^-1 [H^-1]_S:

with H = X X^T of the consumer's inputs. Removing one unit after the other with these updates ends, for any
set of removals, at the least-squares refit of the remaining columns,
so the sweep only has to give the order and the error of every level.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.pruning.solvers.obs import seen
from workbench.statistics.damping import damped


def removal_order(
    weight: Tensor, gram: Tensor, index: Tensor, damp: float, at_once: int = 0
) -> tuple[Tensor, Tensor]:
    """The order in which units go, and the squared output error after each.

    weight (out, in), gram (in, in), index (units, width): the columns of each unit. Returns (order (units,),
    error (units,)). `at_once` units are taken between updates (0: one up to 128 units, else a 128th
    of them); inside such a batch the errors are added up, which leaves out the batch's own interactions.
    """
    units, width = index.shape
    at_once = at_once or max(1, units // 128)
    index = index.to(weight.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(seen(gram), damp)))
    w = weight.to(inverse.dtype, copy=True)
    alive = torch.ones(units, dtype=torch.bool, device=w.device)
    order: list[Tensor] = []
    errors: list[Tensor] = []
    total = w.new_zeros(())
    while bool(alive.any()):
        inner = inverse[index[:, :, None], index[:, None, :]]  # (units, width, width)
        inner = torch.where(alive[:, None, None], inner, torch.eye(width, device=w.device, dtype=w.dtype))
        columns = w[:, index].transpose(0, 1)  # (units, out, width)
        solved = torch.linalg.solve(inner, columns.mT)  # (units, width, out)
        rho = torch.where(alive, (columns.mT * solved).sum((1, 2)), torch.inf)
        take = rho.argsort()[: min(at_once, int(alive.sum()))]
        gone = index[take].flatten()
        order.append(take)
        errors.append(total + rho[take].cumsum(0))
        total = errors[-1][-1]
        solve = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])  # ([H^-1]_SS)^-1 [H^-1]_S:
        w -= w[:, gone] @ solve
        inverse = inverse - inverse[:, gone] @ solve
        inverse[gone, :] = 0
        inverse[:, gone] = 0
        inverse[gone, gone] = 1
        w[:, gone] = 0
        alive[take] = False
    return torch.cat(order), torch.cat(errors)


def refit(weight: Tensor, gram: Tensor, kept: Tensor, damp: float) -> Tensor:
    """Least squares on the kept columns, all rows at once: W H[:, K] H_KK^-1, zeros elsewhere.
    kept bool (in,).
    """
    hessian = damped(seen(gram), damp)
    columns = kept.nonzero().flatten()
    found = torch.zeros_like(weight)
    right = hessian[columns] @ weight.to(hessian.dtype).T
    found[:, columns] = torch.linalg.solve(hessian[columns][:, columns], right).T.to(weight.dtype)
    return found
