from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import workbench
from workbench import BadInput
from workbench.progress import Progress
from workbench.pruning import Prune
from workbench.pruning.axes import SALIENCY
from workbench.pruning.calibration import Calibration
from workbench.pruning.engine.structures import adaptive, block_importance, groups_of, score
from workbench.pruning.pattern import Structures
from workbench.pruning.recovery import pat
from workbench.pruning.saliency.activations import channel_activations, unit_activations
from workbench.pruning.saliency.depth import Stack, deepest, measure_stacks, runs, table_of, weakest
from workbench.pruning.saliency.expert_routing import ExpertPatterns, chosen, routers, routing, selection
from workbench.pruning.saliency.heapr import OutputGradients, atomic_scores
from workbench.statistics import InputCapture
from workbench.subjects.structure.dimensions import shrink, smallest_units
from workbench.subjects.structure.norms import channel_norms, restrict
from workbench.subjects.structure.units import discover


def test_unit_activations_are_the_aggregate_of_what_units_hand_on(checkpoints):
    on = workbench.subject(checkpoints["bert"], data="random")
    groups = discover(on.model, ("heads", "neurons"))
    found = unit_activations(on, groups, examples=5)
    block = on.model.bert.encoder.layer[1]
    seen: dict[str, list[torch.Tensor]] = {"heads": [], "neurons": []}
    block.attention.output.dense.register_forward_pre_hook(
        lambda m, x: seen["heads"].append(x[0].unflatten(-1, (4, 8)).norm(dim=-1).mean((0, 1)))
    )
    block.output.dense.register_forward_pre_hook(lambda m, x: seen["neurons"].append(x[0].abs().mean((0, 1))))
    with torch.no_grad():
        for batch in on.batches("calibration", 1, 5):
            on.task.output(on.model, batch)
    for name, kind in (("bert.encoder.layer.1.attention", "heads"), ("bert.encoder.layer.1", "neurons")):
        assert torch.allclose(found[name][0], torch.stack(seen[kind]).square().mean(0).sqrt(), atol=1e-6)


def test_channel_activations_add_up_the_norms(checkpoints):
    on = workbench.subject(checkpoints["llama"], data="random")
    found = channel_activations(on, 32, examples=3)
    norms, outputs = channel_norms(on.model, 32), []
    for module in norms:
        module.register_forward_hook(lambda m, x, y: outputs.append(y.abs().mean((0, 1))))
    with torch.no_grad():
        for batch in on.batches("calibration", 1, 3):
            on.task.output(on.model, batch)
    assert torch.allclose(
        found, torch.stack(outputs).reshape(3, len(norms), 32).square().mean(0).sqrt().sum(0), atol=1e-5
    )


def test_distances_are_those_of_the_hidden_states(checkpoints):
    on = workbench.subject(checkpoints["llama"], data="random")
    (stack,) = measure_stacks(on, examples=6, batch_size=4)
    batch = next(on.batches("calibration", 6, 6))
    with torch.no_grad():
        states = on.model(
            **{k: v for k, v in batch.items() if k != "labels"}, output_hidden_states=True
        ).hidden_states
    real = batch["attention_mask"].bool()
    last = real.sum(1) - 1
    a, b = (s[torch.arange(6), last] for s in states[:2])
    assert float(stack.angular[0, 1]) == pytest.approx(
        float((F.cosine_similarity(a, b).arccos() / torch.pi).mean()), abs=1e-5
    )
    assert float(stack.influence[0]) == pytest.approx(
        float(1 - F.cosine_similarity(states[0], states[1], dim=-1)[real].mean()), abs=1e-5
    )
    assert float(stack.angular.diagonal().max()) < 1e-3 and torch.allclose(stack.angular, stack.angular.T)
    table = table_of([stack])
    assert len(table) == 3 and table.query("`first` == 0 and blocks == 2").distance.iloc[0] == pytest.approx(
        float(stack.angular[0, 2])
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=2), st.integers(0, 8), st.integers(0, 9))
def test_runs_and_weakest_blocks_are_the_best_there_are(sizes, remove, seed):
    generator = torch.Generator().manual_seed(seed)
    found = [
        Stack(f"s{i}", torch.rand(n + 1, n + 1, generator=generator), torch.rand(n, generator=generator))
        for i, n in enumerate(sizes)
    ]
    most = sum(sizes) - len(sizes)
    if remove > most:
        for attempt in (lambda: runs(found, remove), lambda: weakest([s.influence for s in found], remove)):
            with pytest.raises(BadInput, match="keeps at least one"):
                attempt()
        return
    ways = [[(first, n) for n in range(size) for first in range(size - n + 1)] for size in sizes]
    every = [w for w in itertools.product(*ways) if sum(n for _, n in w) == remove]

    def cost(way) -> float:
        return sum(
            float(s.angular[first, first + n]) if n else 0.0 for s, (first, n) in zip(found, way, strict=True)
        )

    kept = runs(found, remove)
    gone = [(~k).nonzero().flatten().tolist() for k in kept]
    assert sum(len(g) for g in gone) == remove and all(
        g == list(range(g[0], g[0] + len(g))) for g in gone if g
    )
    mine = tuple((g[0], len(g)) if g else (0, 0) for g in gone)
    assert cost(mine) == pytest.approx(min(cost(w) for w in every))
    kept = weakest([s.influence for s in found], remove)
    assert sum(int((~k).sum()) for k in kept) == remove and all(bool(k.any()) for k in kept)
    if len(sizes) == 1:
        assert kept[0].tolist() == smallest_units(found[0].influence, sizes[0] - remove).tolist()


def test_the_simple_rule_keeps_the_last_block():
    assert [k.tolist() for k in weakest(deepest([4]), 2)] == [[True, False, False, True]]


def test_selection_counts_confident_choices_only():
    logits = torch.tensor([[2.0, 1.0, -1.0], [0.1, 0.0, 3.0]])
    assert selection(logits, 2).tolist() == [[2.0, 1.0, 0.0], [pytest.approx(0.1), 0.0, 3.0]]
    assert selection(logits, 2, threshold=0.5).tolist() == [[2.0, 0.0, 0.0], [0.0, 0.0, 3.0]]


def test_routing_is_the_mean_over_real_tokens(checkpoints):
    on = workbench.subject(checkpoints["mixtral"], data="random")
    found = routing(on, examples=6, batch_size=4)
    assert [layer.shape for layer in routers(on)] == [(4, 32)] * 2 and chosen(on) == 2
    assert torch.allclose(found.usage.sum(1), torch.full((2,), 2.0))
    batch = next(on.batches("calibration", 6, 6))
    with torch.no_grad():
        logits = on.model(
            **{k: v for k, v in batch.items() if k != "labels"}, output_router_logits=True
        ).router_logits
    real = batch["attention_mask"].reshape(-1).bool()
    for mine, layer in zip(found.tcess, logits, strict=True):
        assert torch.allclose(mine, selection(layer[real], 2).mean(0), atol=1e-5)
    first = SALIENCY.chosen({"name": "tcess", "local": 1, "confidence": 0.9})
    scores = first(Calibration(on, on.layers(), "calibration", 6), [])
    for mine, layer in zip(scores, logits, strict=True):
        assert torch.allclose(mine, selection(layer[real], 1).mean(0), atol=1e-5)


def test_the_nearest_pattern_is_found_and_survives_the_disk(tmp_path):
    patterns = ExpertPatterns(
        {"code": torch.tensor([[1.0, 0.0, 0.5]]), "prose": torch.tensor([[0.0, 1.0, 0.5]])}
    )
    again = ExpertPatterns.load(patterns.save(tmp_path / "patterns.safetensors"))
    for p in (patterns, again):
        assert p.nearest(torch.tensor([[0.8, 0.3, 0.0]])) == "code"
        assert p.kept("prose", 2).tolist() == [[False, True, True]]
    with pytest.raises(BadInput, match="none is stored"):
        ExpertPatterns().nearest(torch.zeros(1, 3))
    with pytest.raises(BadInput, match="use one model"):
        patterns.nearest(torch.zeros(1, 4))


def test_output_gradients_of_experts_give_the_weights_gradients(checkpoints):
    """dL/dW = sum over tokens of g x^T, for every expert."""
    on = workbench.subject(checkpoints["mixtral"], data="random")
    layer = next(x for x in on.layers() if x.name.endswith("1.mlp.experts.down_proj"))
    xs, gs = {}, {}
    batch = next(on.batches("calibration", 3))
    with (
        torch.enable_grad(),
        InputCapture([layer], lambda a, e, rows: xs.__setitem__(e, rows)),
        OutputGradients([layer], lambda a, e, g: gs.__setitem__(e, g)),
    ):
        loss = on.loss(batch)
    (gradient,) = torch.autograd.grad(loss, [layer.original])
    assert set(xs) == set(gs)
    for expert, rows in xs.items():
        assert torch.allclose(gs[expert].T @ rows, gradient[expert], atol=1e-6)


def test_atomic_scores_are_half_the_fisher_quadratic_of_each_neuron(checkpoints):
    on = workbench.subject(checkpoints["bert"], data="random")
    groups = discover(on.model, ("neurons",))
    found = atomic_scores(on, groups, examples=6, batch_size=3)[groups[1].name][0]
    dense = on.model.bert.encoder.layer[1].output.dense
    kept: dict[str, torch.Tensor] = {}
    dense.register_forward_hook(
        lambda m, x, y: (kept.__setitem__("h", x[0].detach()), kept.__setitem__("y", y), y.retain_grad())[2]
    )
    gram, squares, tokens = torch.zeros(32, 32), torch.zeros(64), 0
    for batch in on.batches("calibration", 3, 6):
        (on.loss(batch) * 3).backward()
        g, h = kept["y"].grad.reshape(-1, 32), kept["h"].reshape(-1, 64)
        gram, squares, tokens = gram + g.T @ g, squares + h.square().sum(0), tokens + len(h)
    want = (
        torch.stack(
            [
                squares[k] / tokens * (dense.weight[:, k] @ (gram / tokens) @ dense.weight[:, k]) / 2
                for k in range(64)
            ]
        )
        * tokens
        / 6
    )
    assert torch.allclose(found, want, rtol=1e-4)


def test_adaptive_shares_add_up_and_spare_the_blocks_that_change_most():
    on = workbench.subject("digits-vit")
    pattern, layers = Structures(("neurons",)), on.layers()
    calibration = Calibration(on, layers, examples=32)
    scored = [
        score(g, SALIENCY.chosen("magnitude"), calibration, pattern) for g in groups_of(on, layers, pattern)
    ]
    importance = list(block_importance(calibration).values())
    assert sum(importance) == pytest.approx(0, abs=1e-6) and max(map(abs, importance)) == pytest.approx(1)
    same, counts = adaptive(scored, 0.5, 0.0, calibration), adaptive(scored, 0.5, 0.3, calibration)
    units = scored[0].group.units
    assert set(same) == {units // 2} and sum(counts) == pytest.approx(sum(same), abs=2)
    assert sorted(range(3), key=counts.__getitem__) == sorted(range(3), key=lambda i: -importance[i])
    assert counts[0] - counts[1] == pytest.approx(-0.3 * units * (importance[0] - importance[1]), abs=1.01)


def test_adaptive_shares_count_what_an_earlier_event_has_taken():
    """A block of which more is gone already than its share now says keeps its zeros; the others lose less."""
    on = workbench.subject("digits-vit")
    pattern, layers = Structures(("neurons",)), on.layers()
    groups = groups_of(on, layers, pattern)
    units = groups[0].units
    gone = torch.arange(units) < int(0.7 * units)
    groups[0].mask(~gone[None])
    calibration = Calibration(on, layers, examples=32)
    scored = [score(g, SALIENCY.chosen("magnitude"), calibration, pattern) for g in groups]
    counts = adaptive(scored, 0.5, 0.1, calibration)
    assert counts[0] == int(gone.sum()) and sum(counts) == pytest.approx(0.5 * 3 * units, abs=2)
    assert not bool(scored[0].kept(counts[0])[0, gone].any())


def test_the_trained_mask_starts_open_and_ends_with_as_many_channels_as_asked():
    mask = pat.ChannelMask(12, 8, 100, torch.device("cpu"))
    assert torch.allclose(mask.value, torch.ones(12))
    with torch.no_grad():
        mask.logits.copy_(torch.linspace(-1, 1, 12))
    mask.set(79)
    assert not mask.hard and float(mask.value.detach().min()) < 0.01 < 0.99 < float(mask.value.detach().max())
    mask.set(80)
    assert mask.value.sum() == 8 and mask.value[4:].all()
    transform = pat.ChannelTransform(6, 2, torch.Generator(), torch.device("cpu"))
    x = torch.randn(6, 3)
    assert torch.equal(transform(x), x)
    with torch.no_grad():
        transform.up.normal_()
        transform.scale.normal_()
    dense = torch.diag(transform.scale) @ (torch.eye(6) + transform.up @ transform.down)
    weight = torch.randn(2, 3, 6)
    assert torch.allclose(pat.Along(transform, 2)(weight), weight @ dense.T, atol=1e-6)


def test_the_merged_smaller_model_is_the_masked_model_that_was_trained():
    on = workbench.subject("digits-vit").copy()
    first = {layer.name: layer.weight.detach().clone() for layer in on.layers("blocks")}
    kept, curve = pat.learn_channels(on, 36, "low-rank", 12, 1e-3, 16, 4, 0, Progress())
    ranks = [torch.linalg.matrix_rank(a.weight.detach() - first[a.name]) for a in on.layers("*fc1")]
    assert ranks == [4] * len(ranks)  # adapters on matrices that write to nothing shared, merged
    assert int(kept.sum()) == 36 and len(curve) == 12 and not on.model.training
    batch = next(on.batches("test", 8))
    with torch.no_grad():
        with restrict(on.model, lambda: kept.float()):
            want = on.task.output(on.model, batch)
        got = on.task.output(shrink(on.model, "channels", kept), batch)
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("method", ["minitron", "pat"])
def test_recovery_of_a_narrower_model_lowers_the_loss(method):
    on = workbench.subject("digits-vit")
    fields = {
        "method": method,
        "pattern": "channels",
        "sparsity": 0.25,
        "predict_examples": 0,
        "test_split": "validation",
    }
    before = Prune(**(fields | {"method": "minitron"})).run(on, Progress(), cache=False)
    after = Prune(**fields, recovery={"name": "finetune", "steps": 40, "learning_rate": 2e-3}).run(
        on, Progress(), cache=False
    )
    assert (
        after.facts["loss"] < 0.8 * before.facts["loss"]
        and after.facts["parameters"] == before.facts["parameters"]
    )
    assert len(after.tables["recovery"]) == 40


def test_a_gradual_cut_passes_through_its_sparsities_and_names_what_went():
    on = workbench.subject("digits-vit")
    result = Prune(
        method="minitron",
        pattern="channels",
        sparsity=0.5,
        sparsity_schedule={"name": "linear", "events": 2},
        recovery={"name": "distil", "steps": 10},
        predict_examples=16,
    ).run(on, Progress(), cache=False)
    assert result.tables["schedule"].sparsity.tolist() == [0.25, 0.5] and result.tables[
        "schedule"
    ].trained.tolist() == [3, 6]
    assert (
        result.facts["units_left"] == 24
        and len(result.tables["units"]) == 24
        and len(result.tables["recovery"]) == 10
    )
    assert (result.table.sparsity == 0.5).all() and "measured_change" in result.facts
    depth = Prune(method="deeper-layers", pattern="layers", sparsity=0.34, predict_examples=0).run(
        on, Progress(), cache=False
    )
    assert depth.table.sparsity.isin([0.0, 1.0]).all() and depth.facts["units_left"] == 2
    assert len(depth.figure(show="distances").data) == 1
