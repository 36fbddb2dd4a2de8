"""Heads, neurons, channels, blocks and experts: their scores and removal beside their authors' code."""

from __future__ import annotations

import copy
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from tests.identity.pairs import Draw, beside
from tests.identity.pruning.given import doubles, flat
from tests.identity.pruning.small_models import llama, watched
from tests.identity.repositories import absent, loaded, part_of, source
from workbench.pruning.axes import SALIENCY
from workbench.pruning.calibration import Calibration
from workbench.pruning.engine import structures
from workbench.pruning.pattern import Structures
from workbench.statistics import gradient_factors
from workbench.storage.identity import AUTHORS, PEER
from workbench.subjects.structure.units import discover

TOKENS = "a Llama of 3 blocks and 9 examples"


def run(on: Any, examples: int = 9) -> None:
    """Pass the first examples of the calibration split through the model."""
    with torch.no_grad():
        for batch in on.batches("calibration", 1, examples):
            on.task.output(on.model, batch)


# ---- scores by gradients -----------------------------------------------------------------------------------
@beside(
    "llm-pruner",
    **source("horseee/LLM-Pruner"),
    kind=AUTHORS,
    compared="the scores of heads and neurons, summed over a group, as shares of the largest (their "
    "'param_mix', on gradients taken one example after the other)",
    inputs=TOKENS,
    tolerance=1e-5,
)
def taylor(draw: Draw) -> tuple[Tensor, Tensor]:
    return group_scores(draw, "param_mix", "taylor2")


@beside(
    "obd",
    **source("horseee/LLM-Pruner"),
    kind=PEER,
    compared="w^2 E[g^2] summed over heads and neurons, as shares of the largest (their 'param_second', on "
    "gradients taken one example after the other)",
    inputs=TOKENS,
    tolerance=1e-5,
)
def second_order(draw: Draw) -> tuple[Tensor, Tensor]:
    return group_scores(draw, "param_second", "obd")


def group_scores(draw: Draw, way: str, saliency: str) -> tuple[Tensor, Tensor]:
    theirs = loaded(
        "horseee/LLM-Pruner",
        "LLMPruner.pruner.hf_llama_pruner",
        packages=("LLMPruner", "LLMPruner.pruner"),
    )
    on = llama(draw)
    model = copy.deepcopy(on.model)
    rows = list(on.batches("calibration", 1, 9))
    matrices = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not model.lm_head]
    for batch in rows:
        found = torch.autograd.grad(
            on.task.criterion(on.task.output(model, batch), batch), [m.weight for m in matrices]
        )
        for matrix, gradient in zip(matrices, found, strict=True):
            weight: Any = matrix.weight
            weight.grad = (0 if weight.grad is None else weight.grad) + gradient / len(rows)
            weight.acc_grad = getattr(weight, "acc_grad", 0) + gradient**2 / len(rows)
    score = theirs.TaylorImportance(group_reduction="sum", taylor=way)
    ways = (theirs.tp.prune_linear_out_channels, theirs.tp.prune_linear_in_channels)
    wanted = []
    for block in model.model.layers:
        heads, feed = block.self_attn, block.mlp
        for out, into, size in (
            ((heads.q_proj, heads.k_proj, heads.v_proj), heads.o_proj, 8),
            ((feed.gate_proj, feed.up_proj), feed.down_proj, 1),
        ):
            pairs = [*((module, ways[0]) for module in out), (into, ways[1])]
            group = [
                (
                    SimpleNamespace(target=SimpleNamespace(module=module), handler=way),
                    list(range(into.in_features)),
                )
                for module, way in pairs
            ]
            wanted.append(score(group).unflatten(0, (-1, size)).sum(1))
    layers = on.layers()
    gradients = gradient_factors(on, layers, "calibration", 9, 4, torch.float32)
    calibration = SimpleNamespace(factors=lambda layer, options: gradients[layer.name])
    entry = SALIENCY.chosen(saliency)
    scores = {layer.name: entry(layer, calibration, None) for layer in layers}
    groups = {g.name: g.unit_scores(scores).flatten() for g in discover(on.model, ("heads", "neurons"))}
    ours = [
        groups[f"model.layers.{number}.{part}"]
        for number in range(len(model.model.layers))
        for part in ("self_attn", "mlp")
    ]
    return torch.cat(wanted) / torch.cat(wanted).max(), torch.cat(ours) / torch.cat(ours).max()


# ---- activations -------------------------------------------------------------------------------------------
@beside(
    "minitron",
    "activation",
    peer="nvidia-modelopt",
    kind=AUTHORS,
    compared="the importance of channels, added up over all norms, and of neurons (theirs an L2 norm over "
    "examples, ours the root of the mean square)",
    inputs=TOKENS,
    tolerance=1e-5,
)
def activations(draw: Draw) -> tuple[Tensor, Tensor]:
    absent("omegaconf", DictConfig=None, OmegaConf=None)
    absent("modelopt.torch.utils.distributed", rank=None)
    absent("modelopt.torch.utils", json_dump=None, safe_load=None)
    hooks = "modelopt.torch.prune.importance_hooks"
    packages = ("modelopt", "modelopt.torch", "modelopt.torch.prune", hooks)
    theirs = part_of("modelopt", f"{hooks}.base_hooks", packages)
    on = llama(draw)
    norms = {n: m for n, m in on.model.named_modules() if "norm" in n}
    downs = {n: m for n, m in on.model.named_modules() if n.endswith("down_proj")}
    with watched(norms, outputs=True) as made, watched(downs) as given:
        run(on)
    found = {}
    for name, states in {**made, **given}.items():
        found[name] = theirs.L2NormHook()
        for state in states:
            found[name](nn.Identity(), (state.transpose(0, 1),), state)
    wanted = [
        torch.stack([found[n].accumulate() for n in norms]).sum(0),
        *(found[n].accumulate() for n in downs),
    ]
    entry, calibration = SALIENCY.chosen("activation"), Calibration(on, on.layers(), examples=9)
    groups = discover(on.model, ("neurons",))
    neurons = entry(calibration, groups)
    ours = [entry(calibration, []), *(neurons[g.name].flatten() for g in groups)]
    return flat(wanted), flat(ours) * 9**0.5


@beside(
    "minitron-depth",
    "block-influence",
    **source("sramshetty/ShortGPT"),
    kind=PEER,
    compared="the influence of the blocks",
    inputs=TOKENS,
    tolerance=1e-6,
)
def influence(draw: Draw) -> tuple[Tensor, Tensor]:
    theirs = loaded("sramshetty/ShortGPT", "short_gpt.metrics", packages=("short_gpt",))
    on = llama(draw)
    states = hidden_states(on)
    wanted = [theirs.block_influence(a, b).mean() for a, b in pairwise(states)]
    (found,) = SALIENCY.chosen("block-influence")(Calibration(on, on.layers(), examples=9), [])
    return torch.stack(wanted), found


def hidden_states(on: Any) -> list[Tensor]:
    """What goes into every block, and comes out of the last: (examples, tokens, hidden) each."""
    blocks = {str(n): block for n, block in enumerate(on.model.model.layers)}
    with watched(blocks) as given, watched(blocks, outputs=True) as made:
        run(on)
    return [torch.cat(states) for states in [*given.values(), made[str(len(blocks) - 1)]]]


@beside(
    "deeper-layers",
    "angular",
    **source("arcee-ai/PruneMe"),
    kind=PEER,
    compared="the angular distances of all runs of one and of two blocks, on the last tokens",
    inputs=TOKENS,
    tolerance=1e-5,
)
def angular(draw: Draw) -> tuple[Tensor, Tensor]:
    theirs = loaded(
        "arcee-ai/PruneMe", "compute_block_similarity.utils", packages=("compute_block_similarity",)
    )
    on = llama(draw)
    states = hidden_states(on)
    whole = torch.ones(states[0].shape[:2])
    last = theirs.get_last_non_padded_tokens([state.double() for state in states], whole)
    wanted = [d for n in (1, 2) for d in theirs.compute_block_distances(last, n)]
    (stack,) = SALIENCY.chosen("angular")(Calibration(on, on.layers(), examples=9), [])
    found = [float(stack.angular[first, first + n]) for n in (1, 2) for first in range(4 - n)]
    return torch.tensor(wanted, dtype=torch.float64), torch.tensor(found, dtype=torch.float64)


@beside(
    "adapt-pruner",
    "adaptive",
    **source("research4pan/AdaptPruner"),
    kind=AUTHORS,
    compared="the importance of the blocks, and the neurons that each loses at 50 %, amplitude 0.1",
    inputs=TOKENS,
    tolerance=1e-5,
)
def adaptive(draw: Draw) -> tuple[Tensor, Tensor]:
    """Their pruner without its graph of dependencies, on blocks that say again what they said."""
    packages = ("LLMPruner", "LLMPruner.pruner")
    pruner = loaded("research4pan/AdaptPruner", "LLMPruner.pruner.hf_pruner", packages=packages)
    module = "LLMPruner.torch_pruning.pruner.algorithms.metapruner"
    made = loaded("research4pan/AdaptPruner", module, packages=packages[:1]).MetaPruner
    on = llama(draw)
    states = hidden_states(on)

    class Replay(nn.Module):
        def __init__(self, after: Tensor) -> None:
            super().__init__()
            self.after, self.part = after, nn.Linear(1, 1)

        def forward(self, before: Tensor) -> tuple[Tensor]:
            return (self.after,)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model: Any = nn.Module()
            self.model.layers = nn.ModuleList(Replay(state) for state in states[1:])

        def forward(self, prompts: Tensor) -> None:
            for layer, state in zip(self.model.layers, states[:-1], strict=True):
                layer(state)

    model: Any = Model()
    parts = [layer.part for layer in model.model.layers]
    that = SimpleNamespace(
        model=model,
        layer_importance=pruner.cosine,
        ch_sparsity_dict={part: [0.0, 0.0] for part in parts},
        root_instances=parts,
        current_step=0,
        per_step_sparsity_increment=0.5,
    )
    that.estimate_layer_importance = lambda *given: made.estimate_layer_importance(that, *given)
    importance = made.adaptive_update_prune_distribution(that, torch.zeros(9, 1), True, 0.1, 9)
    shares = [that.ch_sparsity_dict[part][1] for part in parts]
    calibration = Calibration(on, on.layers(), examples=9)
    entry = SALIENCY.chosen("magnitude")
    scored = [
        structures.score(g, entry, calibration, Structures(("neurons",)))
        for g in discover(on.model, ("neurons",))
    ]
    wanted = [*importance.values(), *(round(share * 48) for share in shares)]
    found = [
        *structures.block_importance(calibration).values(),
        *structures.adaptive(scored, 0.5, 0.1, calibration),
    ]
    return torch.tensor(wanted, dtype=torch.float64), torch.tensor(found, dtype=torch.float64)


# ---- channels that learn to stay ---------------------------------------------------------------------------
@beside(
    "pat",
    **source("kriskrisliu/PAT"),
    kind=AUTHORS,
    compared="outputs, losses, and the gradients of mask, scale and low-rank parts at 4 of 40 steps (the "
    "soft part of the run)",
    inputs="24 normal inputs of 224 channels, rank 200, 168 to stay, fp64",
    tolerance=1e-9,
)
def hybrid_sparsity(draw: Draw) -> tuple[Tensor, Tensor]:
    from workbench.pruning.recovery.pat import ChannelMask, ChannelTransform

    theirs = loaded("kriskrisliu/PAT", "DimDownModule")
    size, rank, left, steps = 224, 200, 168, 40
    inputs, upstream, down, up, scale, logits = (
        draw.normal(*shape, dtype=torch.float64)
        for shape in ((24, size), (24, size), (rank, size), (size, rank), (size,), (size,))
    )
    down, up, scale, logits = down / size**0.5, up / size**0.5, 1 + scale / 5, logits / 8
    with patch("builtins.print"), doubles():
        layer = theirs.DimDownLayer(left, steps, size, True, True, True)
    values = (down, up, scale[None], logits[None, None])
    learned = [
        layer.dimdown_inout[0].weight,
        layer.dimdown_inout[1].weight,
        layer.dimdown_scale.weight,
        layer.dimdown_mask.mask,
    ]
    with doubles():
        transform = ChannelTransform(size, rank, torch.Generator(), torch.device("cpu"))
        mask = ChannelMask(size, left, steps, torch.device("cpu"))
    mine = [transform.down, transform.up, transform.scale, mask.logits]
    with torch.no_grad():
        for parameter, own, value in zip(learned, mine, values, strict=True):
            parameter.copy_(value)
            own.copy_(value.reshape(own.shape))
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for step in (1, 7, 20, 31):
        with patch("builtins.print"), doubles():
            layer.dimdown_mask.step(step)
            outputs, extra = layer(inputs[None], return_loss=True)
        mask.set(step)
        ours = transform(inputs.T).T * mask.value
        more = mask.loss() + transform.identity_loss()
        for parts, made, loss, parameters in (
            (found[0], outputs[0], extra, learned),
            (found[1], ours, more, mine),
        ):
            parts += [made, loss, *torch.autograd.grad((made * upstream).sum() + loss, parameters)]
    return flat(found[0]), flat(found[1])
