from __future__ import annotations

import pytest
import torch

import workbench
from workbench import BadInput
from workbench.evidence.pruning.training_evidence import lying_digits
from workbench.progress import Progress
from workbench.pruning import Subtune, TrainSparse


def test_the_choice_is_greedy_and_the_rest_is_untouched():
    on = lying_digits(workbench.subject("digits-vit"), 100)
    result = Subtune(steps=8, most=2, gain=0.0).run(on, Progress(), cache=False)
    table = result.table
    assert table.blocks.tolist()[:4] == ["head", "0", "1", "2"] and table.added.tolist()[0] == -1
    first = table[table.step == 1].sort_values("loss").iloc[0]
    assert set(first.blocks) <= set(result.facts["chosen"]) and len(table) == 4 + 2
    again = TrainSparse(
        method="dense",
        trainable={"name": "blocks", "blocks": first.blocks},
        steps=8,
        learning_rate=1e-3,
        test_split="validation",
    ).run(on, Progress(), cache=False)
    assert again.facts["loss"] == pytest.approx(first.loss)
    chosen = {int(b) for b in result.facts["chosen"].split(",")}
    for index, ((_, before), (_, after)) in enumerate(zip(on.blocks(), result.subject.blocks(), strict=True)):
        same = all(torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True))
        assert same == (index not in chosen)
    assert len(result.figure().data) == 2


def test_a_gain_that_nothing_reaches_leaves_the_head():
    on = lying_digits(workbench.subject("digits-vit"), 100)
    assert (
        Subtune(steps=1, learning_rate=1e-9, most=1, gain=0.5)
        .run(on, Progress(), cache=False)
        .facts["chosen"]
        == "head"
    )
    with pytest.raises(BadInput, match="choose_on"):
        Subtune(choose_on="test").run(on, Progress(), cache=False)
