"""Experts and their neurons: scores beside their authors' code, and derived a second time."""

from __future__ import annotations

import contextlib
import copy
import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.identity.pairs import Draw, beside
from tests.identity.pruning.small_models import mixtral, watched
from tests.identity.repositories import absent, loaded, source
from workbench.pruning.axes import SALIENCY
from workbench.pruning.calibration import Calibration
from workbench.pruning.engine.structures import Scored, score
from workbench.pruning.pattern import Structures
from workbench.pruning.saliency.expert_routing import routing
from workbench.storage.identity import AUTHORS, FP64, PEER
from workbench.subjects.structure.units import discover


class Expert(nn.Module):
    """Mixtral's stack of experts as matrices of their own, one `down_proj` for each."""

    def __init__(self, stack: Any) -> None:
        super().__init__()
        self.up, self.act_fn, self.count = stack.gate_up_proj, stack.act_fn, stack.num_experts
        self.experts = nn.ModuleList()
        for matrix in stack.down_proj:
            part: Any = nn.Module()
            part.down_proj = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
            part.down_proj.weight = nn.Parameter(matrix.detach().clone())
            self.experts.append(part)

    def forward(self, states: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        total = torch.zeros_like(states)
        expert: Any
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            gate, up = (states[token] @ self.up[number].T).chunk(2, dim=-1)
            made = expert.down_proj(self.act_fn(gate) * up)
            total = total.index_add(0, token, made * shares[token, place, None])
        return total


@beside(
    "heapr",
    **source("LLIKKE/HEAPr"),
    kind=AUTHORS,
    compared="the scores of all experts' neurons, theirs times half the expert's tokens for each item of the "
    "loss: so ours is the change of the mean loss",
    inputs="a Mixtral of 2 blocks with 4 experts, 9 examples",
    tolerance=1e-6,
)
def atomic_experts(draw: Draw) -> tuple[Tensor, Tensor]:
    theirs = loaded("LLIKKE/HEAPr", "pruning.pruning_global")
    on = mixtral(draw)
    model = copy.deepcopy(on.model)
    infos: dict[str, dict[str, Any]] = {}
    names = []
    for number, block in enumerate(model.model.layers):
        block.mlp.experts = Expert(block.mlp.experts)
        for e, expert in enumerate(block.mlp.experts.experts):
            names.append(f"{number}.experts.{e}")
            hook = theirs.build_expert_sensitivity_hook(names[-1], infos)
            expert.down_proj.register_forward_hook(hook)
    items = 0
    for batch in on.batches("calibration", 4, 9):
        count = on.task.items(batch)
        (on.task.criterion(on.task.output(model, batch), batch) * count).backward()
        items += count
    with torch.no_grad():
        for batch in on.batches("calibration", 4, 9):
            on.task.output(model, batch)
    wanted = torch.cat([infos[n]["mean_sen"] * infos[n]["token"] / items / 2 for n in names])
    groups = discover(on.model, ("neurons",))
    calibration = Calibration(on, on.layers(), examples=9)
    found = SALIENCY.chosen({"name": "heapr", "gradients": 9})(calibration, groups)
    return wanted, torch.cat([found[g.name].flatten() for g in groups])


@beside(
    "premoe",
    "tcess",
    peer="the definition, token by token",
    kind=FP64,
    compared="the experts' expected selection scores at the model's two of four, and those counted where "
    "the share of the two is at least 0.6 (ours in float32)",
    inputs="a Mixtral of 2 blocks with 4 experts, 9 examples",
    tolerance=1e-5,
)
def selection_scores(draw: Draw) -> tuple[Tensor, Tensor]:
    on = mixtral(draw)
    gates = {str(n): block.mlp.gate for n, block in enumerate(on.model.model.layers)}
    with watched(gates) as given, torch.no_grad():
        for batch in on.batches("calibration", 3, 9):
            on.task.output(on.model, batch)
    theirs = []
    for threshold in (0.0, 0.6):
        for name, states in given.items():
            rows = torch.cat(states).reshape(-1, 32).double() @ gates[name].weight.detach().double().T
            total = [0.0] * 4
            for row in rows.tolist():
                first = [e for _, e in sorted(((-z, e) for e, z in enumerate(row)))[:2]]
                whole = sum(math.e ** row[e] for e in first)
                for e in first:
                    if math.e ** row[e] / whole >= threshold:
                        total[e] += row[e]
            theirs += [value / len(rows) for value in total]
    entry = SALIENCY.chosen("tcess")(Calibration(on, on.layers(), examples=9), [])
    strict = routing(on, "calibration", 9, threshold=0.6).tcess
    ours = torch.cat([entry.flatten(), strict.flatten()])
    return torch.tensor(theirs, dtype=torch.float64), ours


@beside(
    "premoe",
    "tcess",
    **source("JarvisPei/PreMoe"),
    kind=AUTHORS,
    compared="the experts' mean selected logits, the largest of each token alone (theirs has K = 1 "
    "written into it)",
    inputs="a Mixtral of 2 blocks with 4 experts, 9 examples",
    tolerance=1e-6,
)
def selected_logits(draw: Draw) -> tuple[Tensor, Tensor]:
    """What they collect is a part of a run on their own model: it ends where that would start."""
    absent("faiss")
    absent("datasets", load_dataset=None, get_dataset_config_names=None)
    absent("partial_process", equip_experts=None)
    theirs = loaded("JarvisPei/PreMoe", "collect_utils")
    theirs.F = torch.nn.functional  # which it uses and does not import
    on = mixtral(draw)
    gates = {f"{n}.gate": block.mlp.gate for n, block in enumerate(on.model.model.layers)}
    collected: list[Tensor] = []

    class Done(Exception):
        pass

    class Model:
        def named_modules(self) -> Any:
            return gates.items()

        @property
        def layers(self) -> None:
            with watched(gates) as given, torch.no_grad():
                for batch in on.batches("calibration", 3, 9):
                    on.task.output(on.model, batch)
            for name, gate in gates.items():
                (hook,) = gate._forward_hooks.values()
                hook(gate, (torch.cat([s.flatten(0, -2) for s in given[name]]),), None)
                kept = dict(zip(hook.__code__.co_freevars, hook.__closure__, strict=True))
                collected.append(kept["gate_logits"].cell_contents[-1])
            raise Done

    with contextlib.suppress(Done):
        theirs.collect_moe_gate_logits_r1(Model(), torch.zeros(9, 1))
    wanted = [markers.double().mean(0) for markers in collected]
    return torch.cat(wanted), routing(on, "calibration", 9, local=1).tcess.flatten()


@beside(
    "slimmoe",
    "taylor2",
    peer="the loss's own gradients, example by example",
    kind=FP64,
    compared="the order of the neurons of all experts and the cost of removing so many, as shares of all "
    "(ours in float32)",
    inputs="a Mixtral of 2 blocks with 4 experts of 48 neurons, 9 examples",
    tolerance=1e-5,
)
def slim_experts(draw: Draw) -> tuple[Tensor, Tensor]:
    on = mixtral(draw)
    theirs, ours = [], []
    measured = expert_gradients(on)
    for (weight, mean, square), (down, down_mean, down_square), found in zip(
        measured[::2], measured[1::2], slimmed(on), strict=True
    ):
        gate, up = (mean * weight - weight**2 * square / 2).abs().sum(2).chunk(2, dim=1)
        units = gate + up + (down_mean * down - down**2 * down_square / 2).abs().sum(1)  # (experts, neurons)
        ordered = units.sort(1)
        costs = ordered.values.sum(0).cumsum(0)
        theirs += [ordered.indices.flatten().double(), costs / costs[-1]]
        ours += [found.order.flatten().double(), (found.cost[1:] / found.cost[-1]).double()]
    return torch.cat(theirs), torch.cat(ours)


def expert_gradients(on: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each stack of experts with the mean and the mean square of its gradients, one example after another."""
    model = copy.deepcopy(on.model).double()
    stacks = [block.mlp.experts for block in model.model.layers]
    learned: list[Any] = [p for stack in stacks for p in (stack.gate_up_proj, stack.down_proj)]
    sums = [(torch.zeros_like(p), torch.zeros_like(p)) for p in learned]
    rows = list(on.batches("calibration", 1, 9))
    for batch in rows:
        loss = on.task.criterion(on.task.output(model, batch), batch)
        for (mean, square), gradient in zip(sums, torch.autograd.grad(loss, learned), strict=True):
            mean += gradient / len(rows)
            square += gradient**2 / len(rows)
    return [(p.detach(), *both) for p, both in zip(learned, sums, strict=True)]


def slimmed(on: Any) -> list[Scored]:
    """What our scores say of the neurons of each block's experts."""
    calibration = Calibration(on, on.layers("*mlp.experts*"), examples=9)
    entry, pattern = SALIENCY.chosen({"name": "taylor2", "gradients": 9}), Structures(("neurons",))
    return [score(group, entry, calibration, pattern) for group in discover(on.model, ("neurons",))]


@beside(
    "slimmoe",
    **source("horseee/LLM-Pruner"),
    kind=PEER,
    compared="the order of the neurons of all experts, by the scores of an expert's three matrices (their "
    "'param_mix')",
    inputs="a Mixtral of 2 blocks with 4 experts of 48 neurons, 9 examples",
    tolerance=0.0,
)
def slim_experts_of_others(draw: Draw) -> tuple[Tensor, Tensor]:
    file, packages = "LLMPruner.pruner.hf_llama_pruner", ("LLMPruner", "LLMPruner.pruner")
    theirs = loaded("horseee/LLM-Pruner", file, packages=packages)
    taylor = theirs.TaylorImportance(group_reduction="sum", taylor="param_mix")
    out, into = theirs.tp.prune_linear_out_channels, theirs.tp.prune_linear_in_channels
    on = mixtral(draw)
    measured = expert_gradients(on)
    orders = []
    for stack, down in zip(measured[::2], measured[1::2], strict=True):
        for expert in range(4):
            both = [part[expert].chunk(2, dim=0) for part in stack]
            parts = [tuple(part[0] for part in both), tuple(part[1] for part in both)]
            group = []
            for (weight, mean, square), way in (
                *((part, out) for part in parts),
                (tuple(part[expert] for part in down), into),
            ):
                matrix: Any = nn.Parameter(weight)
                matrix.grad, matrix.acc_grad = mean, square
                target = SimpleNamespace(module=SimpleNamespace(weight=matrix))
                group.append((SimpleNamespace(target=target, handler=way), list(range(48))))
            orders.append(taylor(group).argsort())
    return torch.cat(orders), torch.cat([found.order.flatten() for found in slimmed(on)])
