"""Method cards of scaling laws; title, source and formula are those of the lawbook."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from workbench.names import Method
from workbench.scaling.formulas.lawbook import law

RUNS = "finished runs of several sizes and token counts"


def _card(
    name: str, row: int | None, needs: str, claim: str, runs: str = "", departs: str = "", **fields: Any
) -> Method:
    """The card of a law. `runs` : the project's table to fit it to (none: the one that was drawn from it)."""
    shape = law(name)
    return Method(
        name,
        "scaling",
        shape.title,
        shape.source,
        shape.latex,
        needs,
        claim,
        row,
        recipe=(("scaling-fit", {"law": name} | fields),),
        subject=runs or f"drawn/{name}",
        departs=departs,
    )


#: Of runs that differ in what the law does not see, the best: how it was measured here.
LOWEST: dict[str, Any] = {"runs": "scaling-sweep", "lowest_per_cell": True}


METHODS: list[Method] = [
    _card("chinchilla", None, RUNS, "fitted to small runs, predicts a larger one within 2 %", **LOWEST),
    _card("kaplan", None, RUNS, "fitted to small runs, predicts a larger one within 2 %", **LOWEST),
    _card(
        "over-training",
        None,
        RUNS,
        "fitted to small runs, predicts a larger, over-trained one within 2 %",
        **LOWEST,
    ),
    _card(
        "log-time",
        109,
        "distances of the weights from their start",
        "the distance grows like the logarithm of the step",
    ),
    _card(
        "kaplan-steps",
        140,
        "training curves of several sizes at several batch sizes",
        "predicts a larger run's curve at any batch before it starts",
        "scaling-sweep",
        departs="This law is the last step of the recipe, which is "
        "`workbench.scaling.kaplan.kaplan_recipe` in Python and gives no intervals.",
    ),
    _card(
        "step-law-lr",
        20,
        "a learning-rate grid for several sizes and token counts",
        "advice within 0.1 % of the best loss on a grid",
    ),
    _card(
        "step-law-batch",
        20,
        "a batch-size grid for several token counts",
        "the best batch depends on tokens alone",
    ),
    _card(
        "loss-time",
        25,
        "a one-epoch training curve",
        "the loss falls as a power law of the step",
        departs="The law of a single curve: no runs of one and of many epochs are compared here.",
    ),
    _card(
        "power-data",
        28,
        "end-of-schedule losses of a baseline optimizer",
        "an optimizer's worth is the tokens the baseline would need",
        **LOWEST,
    ),
    _card(
        "sparse-average",
        170,
        "dense runs and runs pruned while training",
        "average parameters explain sparse and dense losses by one law",
        departs="No runs of one's own are behind it: `train-sparse` prunes from the start to seven tenths "
        "of a run, where the paper does from one quarter to three quarters.",
    ),
    _card(
        "ensemble",
        176,
        "ensembles of one to five members",
        "the loss falls to an asymptote as a power of the members",
        departs="Members and parameters have a law each, not one of both, and no runs with tuned weight "
        "decay or distillation are behind it.",
    ),
    _card(
        "power-params",
        176,
        "runs of several sizes on fixed data with tuned regularisation",
        "the loss falls to an asymptote as a power of the parameters",
        **LOWEST,
        departs="Members and parameters have a law each, not one of both, and the runs are not those of a "
        "tuned weight decay.",
    ),
    _card(
        "quantization-aware",
        177,
        "runs with several shares of quantization-aware training",
        "the best share grows with tokens per parameter byte",
        departs="No runs of one's own are behind it, and none here starts quantization-aware training at "
        "the peak rate and decays once.",
    ),
    _card(
        "precision",
        202,
        "runs at several precisions",
        "low precision acts like fewer parameters",
        departs="What rounding does to a model that was trained in low precision, a product over the "
        "precisions, is left out.",
    ),
    _card(
        "weight-precision",
        202,
        "runs at several weight precisions",
        "low weight precision acts like fewer parameters",
    ),
    _card(
        "post-training-precision",
        202,
        "losses before and after post-training quantization",
        "over-trained models lose more to quantization",
        departs="What rounding does to a model that was trained in low precision, a product over the "
        "precisions, is left out.",
    ),
    _card(
        "mixed-quantization",
        368,
        "losses before and after quantizing a share of the parameters, for several sizes",
        "larger models bear a larger share in low precision",
        departs="That size and share multiply is the paper's; its exact factors could not be read, so that "
        "powers stand for them, and no ladder of one's own models is behind it.",
    ),
    _card(
        "float-precision",
        261,
        "runs in several floating-point formats",
        "exponent bits are worth a little more than mantissa bits",
        departs="No runs of one's own are behind it.",
    ),
    _card(
        "data-constrained",
        None,
        "runs that repeat their data",
        "repeating up to four times costs almost nothing",
    ),
    _card(
        "routed",
        None,
        "dense and routed runs",
        "log loss is bilinear in log size and log experts, with saturation",
    ),
    # the instrument trains at every batch size and fits this law to the steps that it counts
    replace(
        _card(
            "batch-hyperbola", None, "steps to one loss at several batch sizes", "steps are smin + emin / B"
        ),
        name="critical-batch",
        recipe=(("critical-batch", {}),),
        subject="digits-vit",
    ),
    _card(
        "farseer",
        None,
        RUNS,
        "the exponent of the data changes with size, which a fit to small runs carries to larger ones",
    ),
    _card(
        "parallel-streams",
        None,
        "runs of several sizes and numbers of parallel streams",
        "so many streams are worth a model larger by a factor that is linear in their logarithm",
    ),
    _card(
        "vocabulary",
        None,
        "runs of several sizes, vocabularies and token counts",
        "larger models deserve larger vocabularies",
        departs="Exponents of the other parameters and of the tokens are two numbers; the authors' code "
        "holds them equal.",
    ),
    _card(
        "data-mixing",
        None,
        "runs of one size on several mixtures of domains",
        "each domain's loss is exponential in the shares of the mixture",
        departs="The factor before the exponential is left out, which the exponents hold, since shares sum "
        "to one; the laws over steps and sizes that the paper nests it in are not here.",
    ),
    _card(
        "domain-sum",
        None,
        "runs of one size on several mixtures of domains",
        "domains add up inside one inverse",
        departs="The terms of size and tokens are constant here: one size and token count at a time.",
    ),
    _card(
        "granularity",
        None,
        "mixture-of-experts runs of several sizes, token counts and sizes of expert",
        "finer experts help as a power law",
    ),
    _card(
        "joint-experts",
        None,
        "dense and mixture-of-experts runs of several active sizes and token counts",
        "one law for dense and routed models, with the token exponent changing with the experts",
    ),
    _card(
        "upcycling",
        None,
        "mixture-of-experts runs that began from dense checkpoints of several lengths",
        "the longer the dense stage, the slower the second one",
        departs="The tokens of the two stages alone; `upcycling-size` has the size.",
    ),
    _card(
        "upcycling-size",
        None,
        "upcycled runs of several sizes and sparsities at fixed tokens",
        "sparsity and active parameters multiply, with an interaction",
    ),
    _card(
        "rate-surface",
        None,
        "runs of several sizes over learning rate and batch size",
        "one bowl in the logarithms moves with size and tokens",
        departs="Where the bowl's lowest point lies is Step Law's; the bowl itself, in place of a grid's "
        "best runs, is this project's choice.",
    ),
    _card(
        "accuracy-of-loss",
        None,
        "task losses and accuracies of several models",
        "accuracy is a sigmoid of the task's loss",
    ),
    _card(
        "error-of-loss",
        None,
        "validation losses and average errors of several models",
        "the average error falls exponentially with the loss",
    ),
    _card("broken-power", None, "losses across a change of slope", "one smooth break joins two power laws"),
    _card("sparse", None, "runs at several sparsities", "sparsity and size act through one term"),
]
