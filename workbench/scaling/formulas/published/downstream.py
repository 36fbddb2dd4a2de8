"""Laws of what a loss is worth on a task: the second of two steps, after a law of the loss."""

from __future__ import annotations

from workbench.axis import Options
from workbench.scaling.formulas.lawbook import LAW
from workbench.scaling.formulas.laws import Law, Parameter
from workbench.scaling.formulas.parameters import predicts, scale


@LAW.add(
    "accuracy-of-loss",
    title="Task accuracy from task loss",
    formula=r"\mathrm{Acc} = \frac{a}{1 + e^{-k(L - L_0)}} + b",
    source="Bhagia et al. 2024, step 2",
)
def accuracy_of_loss(options: Options) -> Law:
    return predicts(
        "a / (1 + exp(-k * (task_loss - L0))) + b",
        (
            Parameter("a", "accuracy lost from no loss to much (negative)", (-1.0, -0.1), low=-1.5, high=0.0),
            scale("k", "how sharply", (0.5, 20.0)),
            Parameter("L0", "loss in the middle", (0.3, 3.0), low=-5, high=20),
            Parameter("b", "accuracy at no loss", (0.3, 1.1), low=0.0, high=1.5),
        ),
        ("task_loss",),
        target="accuracy",
        positive=False,
    )


@LAW.add(
    "error-of-loss",
    title="Downstream error from validation loss",
    formula=r"\mathrm{Err} = \epsilon - k\,e^{-\gamma L}",
    source="Gadre et al. 2024, eq. 5",
)
def error_of_loss(options: Options) -> Law:
    return predicts(
        "eps - k * exp(-gamma * task_loss)",
        (
            scale("eps", "error of a model that knows nothing", (0.3, 1.0)),
            scale("k", "size", (0.1, 100.0)),
            scale("gamma", "how fast less loss helps", (0.1, 5.0)),
        ),
        ("task_loss",),
        target="task_error",
        positive=False,
    )
