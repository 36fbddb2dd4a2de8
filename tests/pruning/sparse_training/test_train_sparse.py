"""Every published way to train with masks: zeros stay, budgets hold, what rests is bit-identical,
and bad requests say why.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import workbench
from workbench import BadInput
from workbench.progress import Progress
from workbench.pruning import Prune, TrainSparse
from workbench.pruning.pattern import obeys, parse
from workbench.pruning.recovery.trainable import frozen_half, modules_by_category, set_trainable
from workbench.pruning.sparse_training.axes import SPARSE_METHOD
from workbench.pruning.sparse_training.parts import megabatch
from workbench.pruning.sparse_training.side_terms import (
    SideBlocks,
    SideEntries,
    SideLowRank,
    block_means,
    lazy_share,
    low_rank_plus_sparse,
)
from workbench.pruning.sparse_training.trained_masks import mask_in_force
from workbench.results import Result
from workbench.subjects import LowRank, Mask

NEEDS = {
    "app": {"stages": 3},
    "dsee": {"stages": 2},
    "slope": {"pattern": "2:4", "backward.lazy": 0.5},
    "ast": {"pattern": "2:4"},
    "dsl": {"masks.period": 2},
    "block-movement": {"pattern": "hybrid 8x8"},
}


def train(subject, method, **fields):
    given = (
        {"steps": 12, "calibration_examples": 8, "sparsity": 0.5}
        | ({"saliency.gradients": 8} if method == "app" else {})
        | NEEDS.get(method, {})
        | fields
    )
    return TrainSparse(method=method, **given).run(subject, Progress(), cache=False)


@pytest.fixture(scope="module")
def vit():
    return workbench.subject("digits-vit")


@pytest.mark.parametrize("method", list(SPARSE_METHOD))
def test_every_method_trains_and_leaves_what_it_says(method, vit):
    result = train(vit, method)
    made = result.subject
    assert (
        not result.facts["diverged"]
        and torch.isfinite(torch.tensor(result.facts["loss"]))
        and len(result.table) == 12
    )
    for layer in made.layers():
        masks = [c for c in layer.changes if c.order == 90]
        assert all(type(c) is Mask for c in masks) and all(type(c) is not LowRank for c in layer.changes)
        if masks and result.instrument.masks not in ("none", "gates"):
            assert obeys(mask_in_force(layer), parse(NEEDS.get(method, {}).get("pattern", "unstructured")))
            if not any(
                c.order > 90 for c in layer.changes
            ):  # merged adapters and trained weights keep every zero
                assert bool((layer.weight[~masks[0].mask] == 0).all())
    if result.instrument.masks not in ("none", "gates"):
        assert result.facts["sparsity"] == pytest.approx(0.5, abs=2e-3)
    for show in ("loss", "masks", "layers"):
        assert result.figure(show=show).data
    assert not any(layer.changes for layer in vit.layers())


def test_lazy_adapters_learn_at_the_peak_rate_in_steps_of_their_own(vit):
    assert [lazy_share(done, 20, 0.1) for done in (0, 17, 18, 19)] == pytest.approx([0, 0, 1, 0.5])
    assert lazy_share(0, 20, 1.0) == 1 and lazy_share(19, 20, 0.0) == 0
    result = train(vit, "slope", steps=20, learning_rate=1e-3, **{"backward.lazy": 0.1})
    sides = [c for a in result.subject.layers("blocks") for c in a.changes if isinstance(c, SideLowRank)]
    moved = max(float(side.up.detach().abs().max()) for side in sides)
    assert 1e-3 < moved <= 1.5e-3 + 1e-6  # Adam's first two steps: the rate, then at most half of it
    assert all(float(side.blend) == 1 for side in sides)


def test_gates_close_at_their_own_defaults():
    """The card's measurement prunes four fifths with the pull and the rate that a bare request has."""
    fields = workbench.method("block-movement").recipe[0][1]
    bare = TrainSparse(method="block-movement", pattern="hybrid 8x8")
    assert bare.masks == TrainSparse(**fields).masks


def test_the_second_mask_saves_in_one_product_of_three(vit):
    once = train(vit, "static", pattern="2:4", steps=4)
    twice = train(vit, "slope", steps=4)
    saved = once.facts["matmul_share"] - twice.facts["matmul_share"]
    weights = sum(a.original.numel() for a in vit.layers("*"))
    assert saved == pytest.approx(0.09375 / 3 * once.facts["weights"] / weights, rel=0.1)


def test_a_result_is_saved_and_its_subject_opens_again(vit, tmp_path):
    result = train(vit, "slope")
    again = Result.load(result.save(tmp_path / "r"))
    assert {type(c) for c in again.subject.layers()[0].changes} == {Mask, SideLowRank}
    assert again.subject.evaluate("test")["loss"] == pytest.approx(result.facts["loss"], abs=1e-5)


def test_the_budget_is_constant_while_weights_are_exchanged(vit):
    result = train(vit, "dsl", steps=20, start="random")
    kept = {round(s, 9) for s in result.tables["masks"].sparsity}
    assert len(kept) == 1 and result.tables["masks"].moved.max() > 0
    assert result.tables["layers"].density.nunique() == 1  # every matrix keeps its own number of weights


def test_half_of_each_kind_of_matrix_rests_bit_for_bit(vit):
    resting = frozen_half(vit, 7)
    before = {name: p.detach().clone() for name, p in vit.model.named_parameters()}
    chosen = {name for name, p in vit.model.named_parameters() if id(p) in resting}
    for index, (_, block) in enumerate(vit.blocks()):
        for kind, modules in modules_by_category(block).items():
            rest = sum(all(id(p) in resting for p in m.parameters()) for m in modules)
            assert (
                rest == (len(modules) + index % 2) // 2
                and len(modules) == {"attention": 4, "feed-forward": 2, "norms": 2}[kind]
            )
    made = train(vit, "hft", seed=7).subject
    for name, p in made.model.named_parameters():
        if name.startswith("vit.layers"):
            assert torch.equal(p, before[name]) == (name in chosen), name
    assert frozen_half(vit, 7) == resting != frozen_half(vit, 8)
    assert {len(frozen_half(vit, s)) for s in range(4)} <= set(range(1, 60))


def test_only_the_named_blocks_and_the_head_learn(vit):
    copy = vit.copy()
    set_trainable(copy, "blocks", (1,))
    learning = {name for name, p in copy.model.named_parameters() if p.requires_grad}
    assert learning == {
        name
        for name, _ in copy.model.named_parameters()
        if name.startswith(("vit.layers.1.", "classifier", "vit.layernorm"))
    }
    assert {id(p) for p in set_trainable(copy, "head")} == {
        id(p) for n, p in copy.model.named_parameters() if n.startswith(("classifier", "vit.layernorm."))
    }
    result = train(vit, "dense", trainable={"name": "blocks", "blocks": "1"})
    for a, b in zip(vit.layers(), result.subject.layers(), strict=True):
        assert torch.equal(a.weight, b.weight) == (".layers.1." not in a.name)


def test_lifted_masks_start_at_the_masked_weights_and_then_learn(vit):
    pruned = (
        Prune(method="random", sparsity=0.5, predict_examples=0, calibration_examples=8)
        .run(vit, Progress(), cache=False)
        .subject
    )
    zero = {layer.name: layer.weight.detach() == 0 for layer in pruned.layers()}
    kept = train(pruned, "dense", masks="kept").subject
    assert all(bool((layer.weight[zero[layer.name]] == 0).all()) for layer in kept.layers())
    lifted = train(pruned, "dense", masks="lifted")
    assert not any(layer.changes for layer in lifted.subject.layers()) and lifted.facts["sparsity"] == 0
    assert all(bool((layer.weight[zero[layer.name]] != 0).any()) for layer in lifted.subject.layers())
    still = train(pruned, "dense", masks="lifted", steps=1, learning_rate=1e-12)
    assert all(
        torch.allclose(a.weight, b.weight, atol=1e-9)
        for a, b in zip(still.subject.layers(), pruned.layers(), strict=True)
    )
    assert all(
        bool((layer.weight[zero[layer.name]] == 0).all()) for layer in pruned.layers()
    )  # the subject given keeps its masks


def test_block_means_are_the_best_constants_and_add_up():
    torch.manual_seed(0)
    weight, mask = torch.randn(3, 10), torch.rand(3, 10) < 0.5
    sums = block_means(weight, mask, 4)
    lost = torch.where(mask, 0.0, weight)
    assert (
        sums.shape == (3, 3)
        and torch.allclose(sums[:, 2], lost[:, 8:].mean(-1))
        and torch.allclose(sums[:, 0], lost[:, :4].mean(-1))
    )
    x = torch.randn(5, 10)
    added = SideBlocks(sums, 4).change(torch.where(mask, weight, 0.0)) - torch.where(mask, weight, 0.0)
    blocks = torch.stack([x[:, :4].sum(1), x[:, 4:8].sum(1), x[:, 8:].sum(1)], 1)
    assert torch.allclose(x @ added.T, blocks @ sums.T, atol=1e-5)


def test_a_planted_low_rank_plus_sparse_matrix_is_found_again():
    torch.manual_seed(0)
    low = torch.randn(40, 3) @ torch.randn(3, 30)
    places = torch.randperm(1200)[:25]
    matrix = (low.flatten().index_add(0, places, 20 * torch.randn(25).sign())).reshape(40, 30)
    found, support, rests = low_rank_plus_sparse(matrix, 3, 25)
    assert set(support.tolist()) == set(places.tolist()) and torch.allclose(found, low, atol=1e-2)
    assert all(a >= b - 1e-4 for a, b in pairwise(rests))


def test_free_entries_move_only_their_places(vit):
    made = train(vit, "dsee", **{"terms.entries": 5}, learning_rate=1e-2).subject
    for before, layer in zip(vit.layers(), made.layers(), strict=True):
        mask, entries, low = (
            next(c for c in layer.changes if isinstance(c, kind)) for kind in (Mask, SideEntries, SideLowRank)
        )
        expected = (
            torch.where(mask.mask, before.weight, 0.0) + low.up @ low.down
        )  # the weight underneath is frozen
        difference = (layer.weight - expected).flatten()
        assert (
            torch.allclose(difference[entries.places], entries.values, atol=1e-5)
            and len(entries.places.unique()) == 5
        )
        difference[entries.places] = 0
        assert float(difference.detach().abs().max()) < 1e-5


def test_megabatches_part_the_data_and_replay_gathers_it(vit):
    size = vit.size("train")
    parts = [megabatch(vit, k, 4, False).split("train")["labels"] for k in range(4)]
    assert (
        torch.equal(torch.cat(parts), vit.split("train")["labels"])
        and max(map(len, parts)) - min(map(len, parts)) <= 1
    )
    assert len(megabatch(vit, 3, 4, True).split("train")["labels"]) == size
    result = train(vit, "app", start="random")
    assert result.tables["stages"].sparsity.tolist() == pytest.approx(
        [0.2, 1 - 0.8 ** (1 + (3.1062837 - 1) / 2), 0.5], abs=2e-3
    )
    assert result.facts["cumulative_error"] == pytest.approx(
        float((1 - result.tables["stages"].accuracy).sum())
    )


@pytest.mark.parametrize("architecture", ["gpt2", "t5", "llama"])
@pytest.mark.parametrize("method", ["slope", "ast", "pst"])
def test_other_architectures(architecture, method, checkpoints):
    result = train(workbench.subject(checkpoints[architecture], data="random"), method, steps=3)
    assert result.facts["sparsity"] == pytest.approx(0.5, abs=2e-3) and torch.isfinite(
        torch.tensor(result.facts["loss"])
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"masks": "kept"}, "needs a subject with masks"),
        ({"pattern": "heads"}, "hybrid"),
        ({"method": "slope", "pattern": "unstructured"}, "double-pruned"),
        ({"method": "dsl", "pattern": "block 4x4"}, "regrow"),
        ({"method": "app"}, "stages"),
        ({"schedule": "cubic"}, "cubic"),
        ({"pattern": "2:4", "sparsity": 0.7}, "contradicts"),
        ({"trainable": "blocks"}, "blocks"),
        ({"trainable": {"name": "blocks", "blocks": "9"}}, "0 to 2"),
        ({"saliency": "loud"}, "saliency"),
        ({"masks": "gates", "pattern": "2:4"}, "gates"),
        ({"stages": 400}, "stages"),
        ({"method": "ast", "pattern": "2:4", "saliency": "obd"}, "adaptive"),
        ({"saliency": "wanda", "allocation": "global"}, "do not compare"),
    ],
)
def test_requests_that_make_no_sense_say_why_before_computing(fields, words, vit):
    with pytest.raises(BadInput, match=words):
        TrainSparse(**fields).run(vit, Progress(), cache=False)


def test_stop_keeps_what_there_is_and_what_is_drawn_meanwhile(vit):
    class Watching(Progress):
        drawn = 0

        def preview(self, result):
            Watching.drawn += len(result.figure().data)
            if len(result.table) >= 4:
                self.stop.set()

    result = TrainSparse(method="ast", pattern="2:4", steps=30).run(vit, Watching(), cache=False)
    assert result.partial and 4 <= len(result.table) < 30 and Watching.drawn > 0
    assert result.facts["sparsity"] == 0.5 and type(result.subject.layers()[0].changes[0]) is Mask
    stopped = Progress()
    stopped.stop.set()
    assert TrainSparse(steps=5).run(vit, stopped, cache=False).partial
