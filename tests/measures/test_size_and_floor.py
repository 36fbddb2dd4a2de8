"""Bytes by hand, the type a checkpoint was stored in, and the floor that it sets."""

from __future__ import annotations

import pytest
import torch

import workbench
from tests.measures.test_measures import examples, on
from workbench.measures import Floor, compare, floor_of, reference_of, size_of, storage_dtype
from workbench.measures.floor import jittered, spacing
from workbench.pruning import Prune
from workbench.quantization import Quantize
from workbench.subjects import LowRank, Mask


def test_a_dense_model_is_its_parameters():
    dense = on("llama", examples("llama"))
    size = size_of(dense)
    assert size.bytes == 4 * sum(p.numel() for p in dense.model.parameters())
    assert size.embedding_bytes == 4 * 99 * 32 and size.bits == 32


def test_tied_embeddings_are_counted_once():
    bytelm = workbench.subject("bytelm")
    assert size_of(bytelm).bytes == 4 * bytelm.parameter_count()
    assert size_of(bytelm).embedding_bytes == 4 * 258 * 192


def test_a_quantized_model_counts_scales_and_layers_that_stay():
    dense = on("llama", examples("llama"))
    dense.splits["calibration"] = dense.splits["test"]
    fields = dict(test_examples=0, predict_examples=0, layers="*.mlp.*")
    changed = Quantize(format="int4", granularity="channel", **fields).run(dense, cache=False).subject
    mlp = [layer for layer in changed.layers() if ".mlp." in layer.name]
    others = [layer for layer in changed.layers("*") if ".mlp." not in layer.name]
    want = sum(4 / 8 * layer.original.numel() + 2 * layer.shape[0] for layer in mlp)
    want += sum(4 * layer.original.numel() for layer in others)
    assert size_of(changed).matrix_bytes == pytest.approx(want)


def test_a_pruned_layer_takes_its_entries_and_a_bitmap():
    dense = on("llama", examples("llama"))
    layer = dense.layers()[0]
    before = size_of(dense).bytes
    mask = torch.zeros(layer.shape, dtype=torch.bool)
    mask[: layer.shape[0] // 4] = True
    layer.attach(Mask(mask))
    weights = layer.original.numel()
    assert size_of(dense).bytes == before - 4 * weights + (4 * weights / 4 + weights / 8)
    layer.attach(LowRank(torch.zeros(layer.shape[0], 2), torch.zeros(2, layer.shape[1])))
    assert size_of(dense).bytes == before - 3 * weights + weights / 8 + 2 * 2 * sum(layer.shape)


def test_a_mask_that_keeps_nearly_all_is_not_worth_a_bitmap():
    dense = on("llama", examples("llama"))
    before = size_of(dense).bytes
    layer = dense.layers()[0]
    layer.attach(Mask(torch.ones(layer.shape, dtype=torch.bool)))
    assert size_of(dense).bytes == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_type_of_the_checkpoint_is_seen_in_its_numbers(dtype):
    dense = on("llama", examples("llama"))
    dense.model.to(dtype).float()
    assert storage_dtype(dense.model) == dtype
    assert size_of(dense).bits == 8 * dtype.itemsize
    assert storage_dtype(dense.model.to(dtype)) == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_spacing_is_the_distance_to_the_next_number(dtype):
    values = torch.tensor([1.0, 1.5, -3.0, 0.3, 100.0]).to(dtype)
    towards = torch.tensor(torch.inf, dtype=dtype)
    steps = torch.nextafter(values.abs(), towards) - values.abs()
    assert torch.equal(spacing(values, dtype), steps.float())
    assert float(spacing(torch.zeros(1), dtype)) == 0


def test_jitter_stays_within_the_rounding():
    dense = on("llama", examples("llama"))
    dense.model.bfloat16().float()
    moved = jittered(dense.copy().model, torch.bfloat16)
    for before, after in zip(dense.model.parameters(), moved.parameters(), strict=True):
        assert bool(((after - before).abs() <= spacing(before, torch.bfloat16) / 2 * 1.0001).all())
        assert torch.equal(before == 0, after == 0)


def test_the_floor_of_bfloat16_lies_above_that_of_float32():
    columns = examples("llama")
    whole, half = on("llama", columns), on("llama", columns)
    half.model.bfloat16().float()
    floors = [floor_of(reference_of(subject)).measures()["kl"] for subject in (whole, half)]
    changed = compare(whole, on("llama", columns, 0.05)).measures()["kl"]
    assert 10 * abs(floors[0]) < floors[1] < changed / 100  # the first is rounding, of either sign


def test_the_floor_is_kept_with_the_subject(tmp_path, monkeypatch):
    """Asked for by itself and by `fidelity`, it is measured once."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    whole = on("llama", examples("llama"))
    found = Floor(test_examples=4).run(whole)
    assert found.facts["stored_as"] == "float32"
    low, value, high = (found.facts[name] for name in ("floor_low", "floor", "floor_high"))
    assert low <= value <= high and value == floor_of(reference_of(whole, limit=4)).distance()[0]
    assert Floor(test_examples=4).stored(on("llama", examples("llama")))


def test_buckets_and_quantiles_of_a_bfloat16_model():
    """A model that computes in bfloat16 is compared through float32 softmaxes."""
    columns = examples("llama")
    dense, changed = on("llama", columns), on("llama", columns, 0.05)
    want = compare(dense, changed).measures()
    dense, changed = (subject.with_model(subject.model.bfloat16()) for subject in (dense, changed))
    got = compare(dense, changed).measures()
    assert got["kl"] == pytest.approx(want["kl"], rel=0.05)
    assert got["kl_99"] == pytest.approx(want["kl_99"], rel=0.1)
    assert compare(dense, dense).measures()["kl"] == 0


def test_pruning_halves_the_bytes_of_the_matrices():
    dense = on("llama", examples("llama"))
    dense.splits |= {"calibration": dense.splits["test"], "train": dense.splits["test"]}
    plan = Prune(method="magnitude", sparsity=0.5, predict_examples=0)
    blocks = sum(layer.original.numel() for layer in dense.layers())
    head = dense.model.lm_head.weight.numel()
    want = (blocks * 17 + head * 32) / (blocks + head)
    assert size_of(plan.run(dense, cache=False).subject).bits == pytest.approx(want)
