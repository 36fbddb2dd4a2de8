"""Published methods as compositions: each fixes the saliency, the compensation and the allocation its paper
uses.

Traits: the names of the structures and dimensions a method is for (none: everything its saliency can score);
"not dimensions": its point is what the remaining weights of the same matrix do, and nothing of it is left
when a whole dimension goes; "refines": the mask is improved by iCBS.
"""

from __future__ import annotations

from workbench.axis import Options, parameter
from workbench.pruning.axes import DIMENSIONS, PRUNING_METHOD, STRUCTURES, Gradients
from workbench.pruning.pattern import Pattern


def parts(
    pattern: Pattern,
    saliency: str,
    compensation: str = "none",
    allocation: str = "layer",
    structured: tuple[str, str] | None = None,
) -> dict[str, str]:
    """The fields that a method fixes for a pattern; nothing but a saliency where a whole dimension goes.
    `structured` are compensation and allocation for heads and neurons, where they are others.
    """
    if set(pattern.kinds) & set(DIMENSIONS):
        compensation, allocation = "none", "layer"
    elif set(pattern.kinds) & set(STRUCTURES) and structured is not None:
        compensation, allocation = structured
    return {"saliency": saliency, "compensation": compensation, "allocation": allocation}


@PRUNING_METHOD.add(
    "obert", formula="w^2 / (2 [F^-1]_qq), survivors updated by the same F", source="Kurtic et al. 2022"
)
def obert(pattern: Pattern, options: Options) -> dict[str, str]:
    return parts(pattern, "fisher", "fisher", "global", structured=("none", "global"))


@PRUNING_METHOD.add(
    "obert-greedy", formula="the same, each block updated after every removal", source="Kurtic et al. 2022"
)
def obert_greedy(pattern: Pattern, options: Options) -> dict[str, str]:
    return parts(pattern, "fisher-greedy", "fisher", "global", structured=("none", "global"))


@PRUNING_METHOD.add("random", formula="u ~ U(0, 1)", source="baseline")
def random(pattern: Pattern, options: Options) -> dict[str, str]:
    return parts(pattern, "random")


@PRUNING_METHOD.add("magnitude", formula="|w|", source="Han et al. 2015")
def magnitude(pattern: Pattern, options: Options) -> dict[str, str]:
    return parts(pattern, "magnitude")


@PRUNING_METHOD.add("gradient", formula="|g w|", source="Lee et al. 2019 (SNIP)")
def gradient(pattern: Pattern, options: Options) -> dict[str, str]:
    return parts(pattern, "gradient", allocation="global")


@PRUNING_METHOD.add("obd", formula="w^2 E[g^2] / 2", source="LeCun et al. 1990")
def obd(pattern: Pattern, options: Options) -> dict[str, str]:
    return parts(pattern, "obd", allocation="global")


@PRUNING_METHOD.add(
    "taylor2", formula="|g w - w^2 E[g^2] / 2|", source="second-order Taylor, empirical Fisher diagonal"
)
def taylor2(pattern: Pattern, options: Options) -> dict[str, str]:
    return parts(pattern, "taylor2", allocation="global")


@PRUNING_METHOD.add("wanda", formula="|w| * rms(x), by rows", source="Sun et al. 2023")
def wanda(pattern: Pattern, options: Options) -> dict[str, str]:
    return parts(pattern, "wanda", allocation="row", structured=("none", "layer"))


@PRUNING_METHOD.add(
    "sparsegpt",
    formula="w^2 / [H^-1]_qq, column by column",
    source="Frantar and Alistarh 2023",
    traits=("not dimensions",),
)
def sparsegpt(pattern: Pattern, options: Options) -> dict[str, str]:
    return parts(pattern, "obs", "obs", structured=("least-squares", "layer"))


class Refinement(Gradients):
    damp: float = parameter(
        0.01, "added to the diagonal of the Fisher, as a share of its mean diagonal", gt=0, scale="log"
    )
    block: int = parameter(256, "candidates that are solved for together", ge=2, le=4096, unit="weights")
    candidates: int = parameter(
        4096, "weights of a layer nearest to the boundary between kept and removed", ge=2, unit="weights"
    )
    rounds: int = parameter(2, "times that all candidates are gone through", ge=1, le=100)
    restarts: int = parameter(1, "annealed starts of every block, besides the mask as it is", ge=0, le=100)
    slope: bool = parameter(
        False,
        "count the mean gradient, which is followed far beyond where it holds; without it the model is taken "
        "to be at a minimum",
    )


@PRUNING_METHOD.add(
    "icbs",
    formula="g d + d F d / 2 over exchanges of weights near the threshold",
    source="Rosenberg et al. 2024",
    options=Refinement,
    traits=("not dimensions", "refines"),
)
def icbs(pattern: Pattern, options: Refinement) -> dict[str, str]:
    return parts(pattern, "wanda", allocation="row")


@PRUNING_METHOD.add(
    "flap",
    formula="z(var(x_j) ||w_:j||^2) by units, the bias takes the mean that is lost",
    source="An et al. 2024",
    traits=("heads", "neurons"),
)
def flap(pattern: Pattern, options: Options) -> dict[str, str]:
    return parts(pattern, "standardised-fluctuation", "bias", "global")


@PRUNING_METHOD.add(
    "llm-pruner", formula="|g w - w^2 E[g^2] / 2| of coupled structures", source="Ma et al. 2023"
)
def llm_pruner(pattern: Pattern, options: Options) -> dict[str, str]:
    return parts(pattern, "taylor2", allocation="global")


@PRUNING_METHOD.add(
    "ziplm",
    formula="output error of the refitted consumer, unit by unit",
    source="Kurtic, Frantar and Alistarh 2023",
    traits=("not dimensions",),
)
def ziplm(pattern: Pattern, options: Options) -> dict[str, str]:
    return parts(pattern, "obs", "least-squares")


@PRUNING_METHOD.add(
    "minitron",
    formula="rms of activations; block influence for layers",
    source="Muralidharan et al. 2024",
    traits=("heads", "neurons", "channels", "layers"),
)
def minitron(pattern: Pattern, options: Options) -> dict[str, str]:
    return parts(pattern, "block-influence" if pattern.kinds == ("layers",) else "activation")


@PRUNING_METHOD.add(
    "adapt-pruner",
    formula="s_b = s - amplitude x importance of the block",
    source="Wang et al. 2025",
    traits=("heads", "neurons"),
)
def adapt_pruner(pattern: Pattern, options: Options) -> dict[str, str]:
    return parts(pattern, "taylor2", allocation="adaptive")


@PRUNING_METHOD.add(
    "heapr", formula="1/2 E[h_k^2] w_k^T G w_k", source="Li et al. 2025", traits=("neurons", "experts")
)
def heapr(pattern: Pattern, options: Options) -> dict[str, str]:
    return parts(pattern, "heapr", allocation="global")


@PRUNING_METHOD.add(
    "slimmoe",
    formula="|g w - w^2 E[g^2] / 2| of the neurons of experts",
    source="Li et al. 2025",
    traits=("neurons",),
)
def slimmoe(pattern: Pattern, options: Options) -> dict[str, str]:
    return parts(pattern, "taylor2")


@PRUNING_METHOD.add(
    "premoe",
    formula="task-conditioned expected selection score",
    source="Pei et al. 2025",
    traits=("experts",),
)
def premoe(pattern: Pattern, options: Options) -> dict[str, str]:
    return parts(pattern, "tcess")


@PRUNING_METHOD.add(
    "deeper-layers", formula="arccos(cos(x^l, x^l+n)) / pi", source="Gromov et al. 2024", traits=("layers",)
)
def deeper_layers(pattern: Pattern, options: Options) -> dict[str, str]:
    return parts(pattern, "angular")


@PRUNING_METHOD.add(
    "pat",
    formula="m = sigmoid(T M) + c, trained with the model",
    source="Liu et al. 2024",
    traits=("channels",),
    beside={"recovery": "finetune", "recovery.steps": 20},
)
def pat(pattern: Pattern, options: Options) -> dict[str, str]:
    return parts(pattern, "learned")
