"""Catalog cards of the pruning methods, and the measurements behind them.

Evidence is taken on `digits-vit` (three networks from three seeds, seconds each) for every composition, so
that a claim can be checked again anywhere, and on `minilm-docstrings` where a card says so. Choices are made
on the validation split, numbers are from the test split, and a claim that fails is stored as failed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from workbench.catalog import Method
from workbench.evidence.harness import compare
from workbench.evidence.pruning import structural_cards, training_cards


def arms_at(sparsity: float, **methods: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {label.replace("_", " "): {"sparsity": sparsity} | fields for label, fields in methods.items()}


def card(
    name: str,
    title: str,
    source: str,
    formula: str,
    needs: str,
    claim: str,
    row: int | None,
    arms: dict[str, dict[str, Any]],
    claims: Sequence[tuple[str, str]],
    **more: Any,
) -> Method:
    measure: Callable[..., dict[str, Any]] = functools.partial(compare, arms=arms, claims=claims, **more)
    return Method(name, "pruning", title, source, formula, needs, claim, row, measure)


HN = {"pattern": "heads+neurons"}
TUNE = {"recovery": {"name": "finetune", "steps": 60, "learning_rate": 1e-3}}
ADAPTERS = {"recovery": {"name": "low-rank", "steps": 60, "learning_rate": 2e-3}}
GRADUAL = TUNE | {"schedule": {"name": "cubic", "events": 6}}

CARDS: list[Method] = [
    card(
        "obert",
        "The Optimal BERT Surgeon",
        "Kurtic et al. 2022",
        "rho_Q = 1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q",
        "calibration gradients",
        "one-shot at 80 %: oBERT <= diagonal Fisher <= magnitude, and its update helps",
        0,
        arms_at(
            0.8,
            obert={"method": "obert"},
            without_update={"method": "obert", "compensation": "none"},
            diagonal={"method": "obd"},
            magnitude={"method": "magnitude"},
        ),
        [("obert", "diagonal"), ("diagonal", "magnitude"), ("obert", "without update")],
    ),
    card(
        "obert-minilm",
        "oBERT on a pretrained BERT",
        "Kurtic et al. 2022",
        "rho_Q = 1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q",
        "calibration gradients",
        "one-shot on minilm-docstrings at 70 %: oBERT <= Wanda <= magnitude, and its update helps",
        0,
        arms_at(
            0.7,
            obert={"method": "obert"},
            without_update={"method": "obert", "compensation": "none"},
            wanda={"method": "wanda"},
            magnitude={"method": "magnitude"},
        ),
        [("obert", "wanda"), ("wanda", "magnitude"), ("obert", "without update")],
        subject="minilm-docstrings",
        seeds=(0,),
    ),
    card(
        "obert-greedy",
        "oBERT with every block updated after every removal",
        "Kurtic et al. 2022; Frantar and Alistarh 2022",
        "greedy removal inside a block with exact updates of w and F^-1",
        "calibration gradients",
        "one-shot at 80 %: no worse than scores computed once",
        0,
        arms_at(0.8, greedy={"method": "obert-greedy"}, once={"method": "obert"}),
        [("greedy", "once")],
    ),
    card(
        "magnitude",
        "Magnitude pruning",
        "Han et al. 2015",
        "|w|",
        "nothing",
        "better than random at 50 %",
        None,
        arms_at(0.5, magnitude={"method": "magnitude"}, random={"method": "random"}),
        [("magnitude", "random")],
    ),
    card(
        "magnitude-global",
        "Magnitude with one threshold for all layers",
        "Han et al. 2015",
        "|w|",
        "nothing",
        "better than the same share in each layer at 50 %",
        None,
        arms_at(
            0.5,
            all_layers={"method": "magnitude", "allocation": "global"},
            each_layer={"method": "magnitude"},
        ),
        [("all layers", "each layer")],
    ),
    card(
        "wanda",
        "Wanda",
        "Sun et al. 2023",
        "|w| ||x||, compared inside each output row",
        "calibration inputs",
        "better than magnitude at 50 %",
        None,
        arms_at(0.5, wanda={"method": "wanda"}, magnitude={"method": "magnitude"}),
        [("wanda", "magnitude")],
    ),
    card(
        "sparsegpt",
        "SparseGPT",
        "Frantar and Alistarh 2023",
        "w^2 / [H^-1]_jj with column-wise OBS updates, H = X X^T",
        "calibration inputs",
        "better than Wanda and magnitude at 60 %",
        None,
        arms_at(
            0.6,
            sparsegpt={"method": "sparsegpt"},
            wanda={"method": "wanda"},
            magnitude={"method": "magnitude"},
        ),
        [("sparsegpt", "wanda"), ("sparsegpt", "magnitude")],
    ),
    card(
        "sparsegpt-2:4",
        "SparseGPT at 2:4",
        "Frantar and Alistarh 2023",
        "the same, two of every four",
        "calibration inputs",
        "better than Wanda and magnitude at 2:4",
        None,
        {m: {"method": m, "pattern": "2:4"} for m in ("sparsegpt", "wanda", "magnitude")},
        [("sparsegpt", "wanda"), ("sparsegpt", "magnitude")],
    ),
    card(
        "snip",
        "SNIP / gradient times weight",
        "Lee et al. 2019",
        "|g w|",
        "calibration gradients",
        "better than magnitude at 70 %",
        None,
        arms_at(0.7, gradient={"method": "gradient"}, magnitude={"method": "magnitude"}),
        [("gradient", "magnitude")],
    ),
    card(
        "obd",
        "Optimal Brain Damage, empirical Fisher",
        "LeCun, Denker and Solla 1990",
        "w^2 E[g^2] / 2",
        "calibration gradients",
        "better than magnitude at 80 %",
        None,
        arms_at(0.8, obd={"method": "obd"}, magnitude={"method": "magnitude"}),
        [("obd", "magnitude")],
    ),
    card(
        "movement",
        "Movement pruning (nested masks)",
        "Sanh et al. 2020",
        "S = -sum lr g w over fine-tuning",
        "fine-tuning",
        "better than magnitude at 90 % with the same training",
        None,
        arms_at(
            0.9,
            movement=GRADUAL | {"method": "movement"},
            magnitude=GRADUAL | {"method": "magnitude", "allocation": "global"},
        ),
        [("movement", "magnitude")],
    ),
    card(
        "icbs",
        "iCBS: block coordinate descent on the brain surgeon's quadratic",
        "Rosenberg et al. 2024",
        "min over x of the Fisher quadratic, one block of candidates at a time",
        "calibration gradients",
        "a refined Wanda mask beats Wanda at 50 %",
        15,
        arms_at(
            0.5, icbs={"method": {"name": "icbs", "gradients": 128, "damp": 1.0}}, wanda={"method": "wanda"}
        ),
        [("icbs", "wanda")],
    ),
    card(
        "gradual-magnitude",
        "To prune, or not to prune",
        "Zhu and Gupta 2017",
        "s_t = s_f (1 - (1 - t/n)^3)",
        "fine-tuning",
        "a cubic ramp beats one-shot pruning and as many training steps at 90 %",
        108,
        arms_at(0.9, cubic=GRADUAL | {"method": "magnitude"}, one_shot=TUNE | {"method": "magnitude"}),
        [("cubic", "one shot")],
    ),
    card(
        "flap",
        "FLAP",
        "An et al. 2024",
        "S_j = var(x_j) ||W_:j||^2, bias += W (1 - m) E[x]",
        "calibration inputs",
        "30 % of heads and neurons: bias compensation helps, and beats Wanda's and magnitude's structures",
        65,
        arms_at(
            0.3,
            flap=HN | {"method": "flap"},
            without_bias=HN | {"method": "flap", "compensation": "none"},
            wanda=HN | {"method": "wanda"},
            magnitude=HN | {"method": "magnitude"},
        ),
        [("flap", "without bias"), ("flap", "wanda"), ("flap", "magnitude")],
    ),
    card(
        "llm-pruner",
        "LLM-Pruner",
        "Ma et al. 2023",
        "sum over a coupled group of |g w - w^2 E[g^2] / 2|",
        "calibration gradients",
        "30 % of heads and neurons: better than magnitude and random; short low-rank recovery helps",
        88,
        arms_at(
            0.3,
            taylor=HN | {"method": "llm-pruner"},
            magnitude=HN | {"method": "magnitude"},
            random=HN | {"method": "random"},
            recovered=HN | ADAPTERS | {"method": "llm-pruner", "recovery.steps": 40},
        ),
        [("taylor", "magnitude"), ("taylor", "random"), ("recovered", "taylor")],
    ),
    card(
        "ziplm",
        "ZipLM",
        "Kurtic, Frantar and Alistarh 2023",
        "rho_S = W_S ([H^-1]_SS)^-1 W_S^T with updates",
        "calibration inputs",
        "half of heads and neurons: better than magnitude and FLAP, and its update helps",
        94,
        arms_at(
            0.5,
            ziplm=HN | {"method": "ziplm"},
            without_update=HN | {"method": "ziplm", "compensation": "none"},
            flap=HN | {"method": "flap"},
            magnitude=HN | {"method": "magnitude"},
        ),
        [("ziplm", "without update"), ("ziplm", "flap"), ("ziplm", "magnitude")],
    ),
    card(
        "perp",
        "PERP: retrain few parameters",
        "Zimmer et al. 2023",
        "W = M * (W_p + B A), with biases and norms",
        "fine-tuning",
        "masked adapters, biases and norms recover most of what full retraining does at 70 %",
        331,
        arms_at(
            0.7,
            adapters=ADAPTERS | {"method": "magnitude"},
            none={"method": "magnitude"},
            full=TUNE | {"method": "magnitude"},
        ),
        [("adapters", "none"), ("full", "none")],
    ),
    card(
        "sparse-peft",
        "SQFT's SparsePEFT",
        "Munoz et al. 2024",
        "L = (B A) * M merges without losing a zero",
        "fine-tuning",
        "adapters on a Wanda mask at 60 % help, and the merged weight keeps the mask exactly",
        359,
        arms_at(
            0.6,
            adapted=ADAPTERS | {"method": "wanda"},
            wanda={"method": "wanda"},
        ),
        [("adapted", "wanda")],
    ),
    card(
        "distillation",
        "Sparse recovery by distillation",
        "Hinton et al. 2015; Kurtic et al. 2022",
        "task + KL(teacher) + hidden states",
        "fine-tuning",
        "at 90 %: distillation recovers more than the task's loss alone in as many steps",
        None,
        arms_at(
            0.9,
            distil={"method": "obert", "recovery": TUNE["recovery"] | {"name": "distil"}},
            task=TUNE | {"method": "obert"},
            none={"method": "obert"},
        ),
        [("distil", "task"), ("task", "none")],
    ),
    card(
        "erdos-renyi",
        "Erdos-Renyi densities",
        "Mocanu et al. 2018; Evci et al. 2020",
        "density ~ (in + out) / (in out)",
        "nothing",
        "better than the same share in each layer at 60 %, by magnitude",
        None,
        arms_at(
            0.6,
            erdos_renyi={"method": "magnitude", "allocation": "erdos-renyi"},
            each_layer={"method": "magnitude"},
        ),
        [("erdos renyi", "each layer")],
    ),
    card(
        "least-squares",
        "Refit the survivors to the dense outputs",
        "Hassibi and Stork 1993",
        "min ||(W - V) X||, V = 0 outside the mask",
        "calibration inputs",
        "a refitted Wanda mask beats Wanda at 60 %",
        None,
        arms_at(
            0.6, refitted={"method": "wanda", "compensation": "least-squares"}, wanda={"method": "wanda"}
        ),
        [("refitted", "wanda")],
    ),
]
CARDS += structural_cards.CARDS
CARDS += training_cards.CARDS
