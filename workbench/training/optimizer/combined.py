"""Several optimizers on disjoint parameters as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from workbench.training.optimizer.group_optimizer import evaluated


class States(Mapping[Tensor, dict[str, Any]]):
    """What the parts keep, by parameter, to be looked up."""

    def __init__(self, parts: list[Optimizer]) -> None:
        self.parts = parts

    def __getitem__(self, parameter: Tensor) -> dict[str, Any]:
        for part in self.parts:
            if parameter in part.state:
                return part.state[parameter]
        raise KeyError(parameter)

    def __iter__(self) -> Iterator[Tensor]:
        for part in self.parts:
            yield from part.state

    def __len__(self) -> int:
        return sum(len(part.state) for part in self.parts)


class Together(Optimizer):
    """Several optimizers on disjoint parameters as one: schedules,
    clipping and checkpoints see a single optimizer.
    """

    def __init__(self, parts: list[Optimizer]) -> None:
        self.parts = parts
        super().__init__([{**group} for part in parts for group in part.param_groups], {})
        self._link()

    def _link(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self.state = States(self.parts)  # type: ignore[assignment]
        self.linked = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Later parameters go to the last part: AdamW beside Muon, the inner one of MKOR."""
        if not getattr(self, "linked", False):  # while torch's constructor runs
            super().add_param_group(param_group)
            return
        self.parts[-1].add_param_group(param_group)
        self._link()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = evaluated(closure)
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._link()

    def kept_state(self) -> list[Any]:
        """Everything that is kept between steps."""
        return [dict(part.state) for part in self.parts]
