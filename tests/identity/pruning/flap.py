"""FLAP's scores, choice and biases beside its authors' whole run on a small Llama."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tests.identity.pairs import Draw, beside
from tests.identity.pruning.given import flat
from tests.identity.pruning.small_models import llama
from tests.identity.repositories import loaded, source
from workbench.pruning.axes import SALIENCY
from workbench.pruning.calibration import Calibration
from workbench.storage.identity import AUTHORS
from workbench.subjects.structure.units import discover

HEAD = 128  # written into the authors' code


def flap_llama(draw: Draw) -> Any:
    on = llama(
        draw,
        hidden_size=2 * HEAD,
        head_dim=HEAD,
        intermediate_size=192,
        num_attention_heads=2,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
    )
    with torch.no_grad():
        for name, parameter in on.model.named_parameters():
            if name.endswith(("o_proj.bias", "down_proj.bias")):  # theirs puts its own in their place
                parameter.zero_()
    return on


def flapped(theirs: Any, on: Any, ratio: float) -> tuple[Any, Tensor]:
    """Their pruning of a copy: the copy, and the standardised scores that they sort."""
    model = copy.deepcopy(on.model)
    model.seqlen = next(on.batches("calibration", 1))["input_ids"].shape[1]
    rotary = model.model.rotary_emb
    for block in model.model.layers:  # as blocks were called then

        def forward(x: Tensor, plain: Any = block.forward, position_ids: Any = None, **more: Any) -> Any:
            more["position_embeddings"] = rotary(x, position_ids)
            return (plain(x, position_ids=position_ids, **more),)

        block.forward = forward
    examples = [(batch["input_ids"],) for batch in on.batches("calibration", 1, 9)]
    seen: list[Tensor] = []
    sort = torch.sort

    def recorded(values: Tensor, *given: Any, **more: Any) -> Any:
        seen.append(values.clone())
        return sort(values, *given, **more)

    about = {"nsamples": 9, "seed": 0, "metrics": "WIFV", "structure": "AL-AM", "unstr": True}
    with (
        patch.object(theirs, "get_loaders", lambda *given, **more: (examples, None)),
        patch.object(theirs, "tqdm", lambda values, **more: values),
        patch.object(theirs.torch, "sort", recorded),
        patch.object(theirs.torch, "half", torch.float32),  # in which it keeps the means
        patch("builtins.print"),
    ):
        theirs.prune_flap(
            SimpleNamespace(**about, pruning_ratio=ratio), model, None, device=torch.device("cpu")
        )
    return model, seen[-1]


def welford(theirs: Any) -> Any:
    """Their statistics with the variance over all tokens: theirs forgets the first sequence and takes the new
    mean for the old one, as both are one tensor.
    """

    class Statistics(theirs.BiasGPT):
        rows: Tensor | None = None

        def add_batch(self, inputs: Tensor, outputs: Tensor) -> None:
            flat = inputs.flatten(0, -2)
            self.rows = flat if self.rows is None else torch.cat([self.rows, flat])
            self.fluc_inp = self.rows.var(0, unbiased=False)
            self.baseline_inp = self.rows.mean(0)

    return Statistics


FLAP = dict(**source("CASIA-IVA-Lab/FLAP"), kind=AUTHORS)


@beside(
    "flap",
    "standardised-fluctuation",
    compared="the standardised scores of heads and neurons (their running variance, which skips the first "
    "sequence, replaced by the variance; both in float32)",
    inputs="a Llama of 3 blocks, 2 heads of 128 and 192 neurons, 9 examples",
    tolerance=1e-4,
    **FLAP,
)
def flap_scores(draw: Draw) -> tuple[Tensor, Tensor]:
    theirs = loaded("CASIA-IVA-Lab/FLAP", "lib.prune")
    on = flap_llama(draw)
    with patch.object(theirs, "BiasGPT", welford(theirs)):
        _, scores = flapped(theirs, on, 0.3)
    groups = discover(on.model, ("heads", "neurons"))
    calibration = Calibration(on, on.layers(), examples=9)
    found = SALIENCY.chosen("standardised-fluctuation")(calibration, groups)
    ours = [found[g.name].flatten() for kind in ("heads", "neurons") for g in groups if g.kind == kind]
    # ours are moved so that none is negative, which changes no comparison
    return scores - scores.min(), torch.cat(ours)


@beside(
    "flap",
    compared="what is left of the heads and neurons, and the consumers' new biases (theirs is asked for one "
    "neuron less, as the unit at its threshold goes as well)",
    inputs="a Llama of 3 blocks, 2 heads of 128 and 192 neurons, 9 examples, 30 %",
    tolerance=1e-5,
    **FLAP,
)
def flap_model(draw: Draw) -> tuple[Tensor, Tensor]:
    from workbench.pruning import Prune

    theirs = loaded("CASIA-IVA-Lab/FLAP", "lib.prune")
    on = flap_llama(draw)
    neurons = 3 * (2 * 512 / 3 + 192)
    with patch.object(theirs, "BiasGPT", welford(theirs)):
        model, _ = flapped(theirs, on, 0.3 - 1 / neurons)
    result = Prune(
        method="flap",
        pattern={"name": "heads+neurons", "remove": False},
        sparsity=0.3,
        calibration_examples=9,
        predict_examples=0,
    ).run(on, cache=False)
    assert result.subject is not None
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for blocks, found in ((model.model.layers, parts[0]), (result.subject.model.model.layers, parts[1])):
        for block in blocks:
            found += [
                (block.self_attn.v_proj.weight != 0).any(1).float(),
                (block.mlp.up_proj.weight != 0).any(1).float(),
                block.self_attn.o_proj.bias,
                block.mlp.down_proj.bias,
            ]
    return flat(parts[0]), flat(parts[1])
