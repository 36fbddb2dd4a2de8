"""Published methods as compositions: a preset fixes the saliency,
the compensation and the allocation its paper uses.
"""

from __future__ import annotations

from dataclasses import dataclass

from workbench.errors import BadInput
from workbench.pruning.pattern import Dimension, Pattern, Structures


@dataclass(frozen=True)
class Preset:
    saliency: str
    compensation: str = "none"
    allocation: str = "layer"
    source: str = ""
    refine: bool = False  # improve the mask by iCBS
    only: tuple[
        str, ...
    ] = ()  # the coupled structures and dimensions it is for; empty: everything its saliency can score


PRESETS: dict[str, Preset] = {
    "random": Preset("random", source="baseline"),
    "magnitude": Preset("magnitude", source="Han et al. 2015"),
    "gradient": Preset("gradient", allocation="global", source="Lee et al. 2019 (SNIP)"),
    "obd": Preset("obd", allocation="global", source="LeCun et al. 1990"),
    "taylor2": Preset(
        "taylor2", allocation="global", source="second-order Taylor, empirical Fisher diagonal"
    ),
    "movement": Preset("movement", allocation="global", source="Sanh et al. 2020"),
    "wanda": Preset("wanda", allocation="row", source="Sun et al. 2023"),
    "sparsegpt": Preset("obs", "obs", source="Frantar and Alistarh 2023"),
    "obert": Preset("fisher", "fisher", "global", source="Kurtic et al. 2022"),
    "obert-greedy": Preset(
        "fisher-greedy",
        "fisher",
        "global",
        source="Kurtic et al. 2022, each block updated after every removal",
    ),
    "icbs": Preset("wanda", allocation="row", source="Rosenberg et al. 2024", refine=True),
    "flap": Preset("fluctuation", "bias", "global", source="An et al. 2024"),
    "llm-pruner": Preset("taylor2", allocation="global", source="Ma et al. 2023"),
    "ziplm": Preset("obs", "least-squares", source="Kurtic, Frantar and Alistarh 2023"),
    "minitron": Preset(
        "activation", source="Muralidharan et al. 2024", only=("heads", "neurons", "channels", "layers")
    ),
    "adapt-pruner": Preset(
        "taylor2", allocation="adaptive", source="Wang et al. 2025", only=("heads", "neurons")
    ),
    "heapr": Preset("heapr", allocation="global", source="Li et al. 2025", only=("neurons", "experts")),
    "slimmoe": Preset("taylor2", source="Li et al. 2025", only=("neurons",)),
    "premoe": Preset("tcess", source="Pei et al. 2025", only=("experts",)),
    "deeper-layers": Preset("angular", source="Gromov et al. 2024", only=("layers",)),
    "pat": Preset("learned", source="Liu et al. 2024", only=("channels",)),
}

#: What a structured pattern replaces a preset's parts by, where those are defined for single weights.
STRUCTURED = {
    "wanda": Preset("wanda"),
    "sparsegpt": Preset("obs", "least-squares"),
    "obert": Preset("fisher", "none", "global"),
    "obert-greedy": Preset("fisher-greedy", "none", "global"),
}

#: Methods whose point is what the remaining weights of the same matrix do;
#: nothing of it is left when a whole dimension goes.
NOT_DIMENSIONAL = ("sparsegpt", "icbs", "movement", "flap", "ziplm")


def preset_for(method: str, pattern: Pattern) -> Preset:
    """The parts a method fixes for a pattern. `BadInput` when the method has no form for it."""
    preset = PRESETS[method]
    kinds = (
        pattern.kinds
        if isinstance(pattern, Structures)
        else (pattern.kind,)
        if isinstance(pattern, Dimension)
        else ()
    )
    if preset.only and not (kinds and set(kinds) <= set(preset.only)):
        raise BadInput(
            f"method: {method} removes {', '.join(preset.only)}; "
            "choose one of them as the pattern, or another method"
        )
    if isinstance(pattern, Structures):
        return STRUCTURED.get(method, preset)
    if isinstance(pattern, Dimension):
        if method in NOT_DIMENSIONAL:
            raise BadInput(
                f"method: {method} has no form for whole {pattern.kind}; "
                "choose magnitude, taylor2, minitron or another that scores them"
            )
        saliency = "block-influence" if (method, pattern.kind) == ("minitron", "layers") else preset.saliency
        return Preset(saliency, source=preset.source)
    return preset
