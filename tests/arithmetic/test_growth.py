"""Growth: outputs at step 0, exact maps, and the `grow` instrument on six architectures."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

import workbench
from tests.arithmetic.test_merge import opened, tensors
from tests.conftest import ARCHITECTURES, tiny
from workbench.arithmetic import GROWTH, Grow, VCycle, stacking_tokens
from workbench.arithmetic.growth import v_cycle
from workbench.arithmetic.growth.width import cancelling, widened
from workbench.errors import BadInput
from workbench.progress import Progress

PRE_NORM = ("gpt2", "llama", "mixtral", "t5", "vit")


@pytest.fixture(autouse=True)
def quiet(cache):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def grown(on, name, **fields):
    return Grow(method=name, test_examples=2, **fields).run(on, Progress(), cache=False)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_width_keeps_the_function(architecture, family):
    """Logits at step 0 equal to 1e-5, with noise too."""
    base, _ = family(architecture)
    on = opened(base)
    for name, fields in (
        ("hypercloning", {}),
        ("hypercloning", {"method.noise": 10.0}),
        ("fpi", {"times": 3}),
    ):
        result = grown(on, name, **fields)
        assert result.facts["change_of_outputs"] < 1e-5, (name, fields)
        assert result.facts["loss"] == pytest.approx(result.facts["small_loss"], abs=1e-5)
        assert result.facts["parameters"] > 2 * result.facts["parameters_before"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_other_growth_runs_and_its_model_opens_again(architecture, family, tmp_path):
    base, _ = family(architecture)
    on = opened(base)
    for name in ("aki", "stack", "interpolation"):
        result = grown(on, name)
        assert math.isfinite(result.facts["loss"])
        again = workbench.subject(result.subject.save(tmp_path / name))
        held = tensors(result.subject)
        assert all(torch.equal(value, held[key]) for key, value in tensors(again).items())
        assert again.evaluate("test", limit=2)["loss"] == pytest.approx(result.facts["loss"], abs=1e-6)
        result.figure()


@pytest.mark.parametrize("architecture", PRE_NORM)
def test_blocks_of_zeros_keep_the_function_of_pre_norm_models(architecture, family):
    base, _ = family(architecture)
    result = grown(opened(base), "zero-blocks", times=3)
    assert result.facts["change_of_outputs"] < 1e-5
    assert len(result.subject.blocks()) == 3 * len(opened(base).blocks())


def test_blocks_of_zeros_are_refused_where_the_function_changes(family):
    """Norms that have learned something, one after another, are not one norm."""
    _, (base, _) = family("bert")
    with pytest.raises(BadInput, match="zero-blocks does not keep the function of Bert"):
        grown(opened(base), "zero-blocks")


def test_a_tied_head_becomes_its_own():
    model = tiny("gpt2").eval()
    made = widened(model, 2)
    assert made.lm_head.weight is not made.transformer.wte.weight
    ids = torch.arange(12).reshape(2, 6)
    assert torch.allclose(model(ids).logits, made(ids).logits, atol=1e-5)


def test_stacking_and_interpolation_copy_the_blocks_they_say():
    from workbench.arithmetic.growth.depth import interpolation, stack
    from workbench.axis import Options

    model = tiny("llama")
    old = [block.mlp.up_proj.weight for block in model.model.layers]
    for entry, order in ((stack, [0, 1, 0, 1]), (interpolation, [0, 0, 1, 1])):
        made = entry(model, 2, Options())
        found = [block.mlp.up_proj.weight for block in made.model.layers]
        assert [torch.equal(w, old[i]) for w, i in zip(found, order, strict=True)] == [True] * 4


def test_aki_takes_new_rows_from_the_block_above():
    model = tiny("bert")
    made = widened(model, 2, next_block=True)
    first, second = (block.intermediate.dense.weight for block in model.bert.encoder.layer)
    new = made.bert.encoder.layer[0].intermediate.dense.weight
    assert torch.allclose(new, torch.cat([torch.cat([first] * 2, 1), torch.cat([second] * 2, 1)]) / 2)
    last = made.bert.encoder.layer[1].intermediate.dense.weight
    assert torch.allclose(last, torch.cat([torch.cat([second] * 2, 1)] * 2) / 2)


def test_noise_has_the_asked_size_and_cancels():
    weight = torch.randn(64, 96)
    noise = cancelling(weight, 1, 3, 20.0)
    parts = noise.chunk(3, 1)
    assert torch.equal(parts[0], -parts[1]) and not parts[2].any()
    signal = weight[:, :32].square().mean() / parts[0].square().mean()
    assert 10 * math.log10(float(signal)) == pytest.approx(20.0, abs=1e-3)


def coalescing(large: int, small: int) -> Tensor:
    """F (small, large): unit i of the small model is the mean of i and i + small, as far as there are any;
    every row sums to one (Zou et al. 2024, eq. 3, and the authors' default).
    """
    joined = torch.cat([torch.eye(small), torch.eye(small, large - small)], 1)
    return joined / joined.sum(1, keepdim=True)


def copying(coalesced: Tensor) -> Tensor:
    """T (large, small) of F, or G of R: its transpose with rows that sum to one."""
    turned = coalesced.T
    return turned / turned.sum(1, keepdim=True)


def merging_blocks(large: int, small: int) -> Tensor:
    """R (small, large): each block of the small model is the mean of large / small neighbours."""
    each = large // small
    return torch.eye(small).repeat_interleave(each, 1) / each


def smaller(weight: Tensor, out: Tensor, inside: Tensor) -> Tensor:
    """A matrix (out, in) between coalesced units: F_out W T_in."""
    return out @ weight @ copying(inside)


def larger(weight: Tensor, out: Tensor, inside: Tensor) -> Tensor:
    """The same the other way: T_out W F_in, which answers what W answered on copies of its inputs."""
    return copying(out) @ weight @ inside


def test_maps_of_a_v_cycle_are_left_inverses():
    for large, small in ((8, 4), (6, 4), (5, 5)):
        joined = coalescing(large, small)
        assert torch.allclose(joined @ copying(joined), torch.eye(small))
        assert torch.allclose(joined.sum(1), torch.ones(small))
    blocks = merging_blocks(6, 2)
    assert torch.allclose(blocks @ copying(blocks), torch.eye(2))


def test_a_matrix_made_larger_and_smaller_again_is_itself():
    weight = torch.randn(4, 3)
    out, inside = coalescing(7, 4), coalescing(6, 3)
    big = larger(weight, out, inside)
    assert torch.allclose(smaller(big, out, inside), weight, atol=1e-6)
    x = torch.randn(3)
    assert torch.allclose(big @ (copying(inside) @ x), copying(out) @ (weight @ x), atol=1e-6)
    assert torch.equal(v_cycle.interpolated(weight, -weight, 0.5), torch.zeros(4, 3))


def test_a_matrix_is_joined_as_the_maps_say():
    """F W T of the source, by the function that makes the smaller model."""
    model, weight = nn.ModuleDict({"layer": nn.Linear(6, 8)}), torch.randn(8, 6)
    made = v_cycle.joined(model, "layer.weight", weight, (4, 3))
    assert torch.allclose(made, smaller(weight, coalescing(8, 4), coalescing(6, 3)), atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_made_wider_and_coalesced_again_is_itself(architecture, family):
    """The maps are left inverses on whole models: a head that shares its weight has become its own."""
    _, (base, _) = family(architecture)
    on = opened(base)
    again = v_cycle.coalesced(widened(on.model, 2), 2, 1)
    held = dict(again.named_parameters())
    for name, value in on.model.named_parameters():
        scale = 2**0.5 if name == "lm_head.weight" and architecture == "t5" else 1.0
        assert torch.allclose(held[name], scale * value, atol=1e-6), name
    deep = v_cycle.coalesced(GROWTH.chosen("interpolation")(on.model, 2), 1, 2)
    held = dict(deep.named_parameters())
    assert all(torch.allclose(held[n], v, atol=1e-6) for n, v in on.model.named_parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_v_cycle_draws_the_large_model_towards_copies(architecture, family):
    _, (base, _) = family(architecture)
    on = opened(base)
    result = VCycle(small_steps=2, batch_size=4, validation_examples=2).run(on, Progress(), cache=False)
    assert list(result.table["stage"]) == ["large", "coalesced", "small, trained", "large again"]
    assert result.facts["share_of_large_step"] < 0.6 and math.isfinite(result.facts["loss"])
    stays = VCycle(small_steps=2, alpha=0.0, validation_examples=2).run(on, Progress(), cache=False)
    assert all(torch.equal(v, tensors(on)[n]) for n, v in tensors(stays.subject).items())
    result.figure()


def test_coalescing_and_going_back_answers_as_the_small_model_did(family):
    """alpha 1: what the small model says, the large one says (BERT norms its embeddings)."""
    from workbench.arithmetic.grow import outputs
    from workbench.arithmetic.growth.growth import relative_change

    _, (base, _) = family("bert")
    on = opened(base)
    small = on.with_model(v_cycle.coalesced(on.model, 2, 1).eval())
    back = on.with_model(v_cycle.interpolated_model(on.model, small.model, 2, 1, 1.0).eval())
    assert relative_change(outputs(small), outputs(back)) < 1e-5


def test_the_guideline_is_its_formula():
    """With N = 7e9 and C = 1e22: log10 d = 0.88 * 9.8451 + 163.27 / 22 - 5.74."""
    assert math.log10(stacking_tokens(7e9, 1e22)) == pytest.approx(
        0.88 * math.log10(7e9) + 7.42136 - 5.74, abs=1e-4
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"flops": 1e18}, "the guideline is for"),
        ({"method": "stack", "times": 4, "flops": 10.0}, "below any training run"),
    ],
)
def test_what_cannot_be_grown_is_said_in_one_line(fields, said, family):
    base, _ = family("bert")
    with pytest.raises(BadInput, match=said) as error:
        Grow(**fields).run(opened(base), cache=False)
    assert "\n" not in str(error.value)


def test_a_plain_module_has_no_size_to_change(cache):
    data = {"inputs": torch.randn(40, 4), "labels": torch.randint(3, (40,))}
    with pytest.raises(BadInput, match="no transformers configuration"):
        Grow().run(workbench.subject(torch.nn.Linear(4, 3), data=data), cache=False)


def test_names_of_growth_are_methods_or_entries():
    assert {"hypercloning", "fpi", "aki", "stack", "interpolation", "zero-blocks"} == set(GROWTH)
