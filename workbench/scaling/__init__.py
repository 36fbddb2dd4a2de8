"""Scaling laws: runs, laws, fits that carry their doubt, and plans.

    runs = scaling.load_runs("sweep.csv", columns="params=n_params, loss=eval/loss")
    result = scaling.ScalingFit(law="chinchilla").run(runs)
    plan = scaling.ScalingPlan(flops=1e22).run(runs)
    following = scaling.NextRun(target="params=7e9, tokens=1.4e11").run(runs)

Underneath, without the instruments: `fit(law("chinchilla"), runs)`, `bootstrap`, `profile`,
`compute_optimal`.
"""

from workbench.scaling.comparison import compare, cross_validate, extrapolation, held_out
from workbench.scaling.doubt.stacking import Stack, stack
from workbench.scaling.doubt.uncertainty import bootstrap, influence, profile
from workbench.scaling.fitting import Fit, fit
from workbench.scaling.formulas.lawbook import LAW, law, laws
from workbench.scaling.formulas.laws import Law, Parameter
from workbench.scaling.next_run import NextRun
from workbench.scaling.objective import Objective
from workbench.scaling.planning import Draws, compute_optimal
from workbench.scaling.proposing.proposals import Proposer
from workbench.scaling.runs import Runs
from workbench.scaling.scaling_fit import ScalingFit
from workbench.scaling.scaling_plan import ScalingPlan

#: Runs from a file, a DataFrame or a mapping; see `Runs.open`.
load_runs = Runs.open

__all__ = [
    "LAW",
    "Draws",
    "Fit",
    "Law",
    "NextRun",
    "Objective",
    "Parameter",
    "Proposer",
    "Runs",
    "ScalingFit",
    "ScalingPlan",
    "Stack",
    "bootstrap",
    "compare",
    "compute_optimal",
    "cross_validate",
    "extrapolation",
    "fit",
    "held_out",
    "influence",
    "law",
    "laws",
    "load_runs",
    "profile",
    "stack",
]
