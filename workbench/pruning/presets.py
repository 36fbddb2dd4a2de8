"""Published methods as compositions: a preset fixes the saliency, the compensation and the allocation its paper uses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    saliency: str
    compensation: str = "none"
    allocation: str = "layer"
    source: str = ""
    refine: bool = False  # improve the mask by iCBS


PRESETS: dict[str, Preset] = {
    "random": Preset("random", source="baseline"),
    "magnitude": Preset("magnitude", source="Han et al. 2015"),
    "gradient": Preset("gradient", allocation="global", source="Lee et al. 2019 (SNIP)"),
    "obd": Preset("obd", allocation="global", source="LeCun et al. 1990"),
    "taylor2": Preset("taylor2", allocation="global", source="second-order Taylor, empirical Fisher diagonal"),
    "movement": Preset("movement", allocation="global", source="Sanh et al. 2020"),
    "wanda": Preset("wanda", allocation="row", source="Sun et al. 2023"),
    "sparsegpt": Preset("obs", "obs", source="Frantar and Alistarh 2023"),
    "obert": Preset("fisher", "fisher", "global", source="Kurtic et al. 2022"),
    "obert-greedy": Preset("fisher-greedy", "fisher", "global", source="Kurtic et al. 2022, each block updated after every removal"),
    "icbs": Preset("wanda", allocation="row", source="Rosenberg et al. 2024", refine=True),
    "flap": Preset("fluctuation", "bias", "global", source="An et al. 2024"),
    "llm-pruner": Preset("taylor2", allocation="global", source="Ma et al. 2023"),
    "ziplm": Preset("obs", "least-squares", source="Kurtic, Frantar and Alistarh 2023"),
}

#: What a structured pattern replaces a preset's parts by, where those are defined for single weights.
STRUCTURED = {"wanda": Preset("wanda"), "sparsegpt": Preset("obs", "least-squares"), "obert": Preset("fisher", "none", "global"),
              "obert-greedy": Preset("fisher-greedy", "none", "global")}  # fmt: skip
