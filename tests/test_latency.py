from __future__ import annotations

import pytest
import torch
from torch import nn

import workbench
from workbench.latency import Latency, MemoryWatch, count_flops, formats_of, model_bytes
from workbench.progress import Progress
from workbench.subjects import Mask


@pytest.fixture()
def net():
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
    return workbench.subject(model, data={"inputs": torch.randn(80, 32), "labels": torch.randint(16, (80,))})


def test_flops_bytes_and_parameters_are_exact(net):
    batch = next(net.batches("test", 8))
    assert count_flops(net, batch) == 2 * 8 * (32 * 64 + 64 * 16)
    assert model_bytes(net.model) == 4 * (32 * 64 + 64 + 64 * 16 + 16)
    layer = net.layers("0")[0]
    mask = torch.zeros(64, 32, dtype=torch.bool)
    mask[:, :8] = True
    layer.attach(Mask(mask))
    result = Latency(batch_size=8, repeats=3, layers="*").run(net, Progress(), cache=False)
    facts = result.facts
    assert facts["nonzero"] == facts["parameters"] - 64 * 24
    assert facts["flops_without_zeros"] == facts["flops"] - 2 * 8 * 64 * 24
    assert facts["packed_bytes"] == facts["dense_bytes"] - 4 * 64 * 24 + 64 * 32 // 8
    assert facts["quartile_low_ms"] <= facts["median_ms"] <= facts["quartile_high_ms"]
    row = result.table.set_index("layer").loc["0"]
    assert row["sparsity"] == 0.75 and row["csr_ms"] > 0 and row["bsr16_ms"] > 0
    assert len(result.figure().data) >= 3


def test_peak_memory_counts_what_is_alive_together():
    with torch.no_grad(), MemoryWatch() as watch:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b + 1
        assert watch.alive == 8000 and watch.peak == 8000
        del b, c
        assert watch.alive == 0


def test_every_format_multiplies_alike():
    weight = torch.randn(32, 64) * (torch.rand(32, 64) < 0.2)
    x = torch.randn(10, 64)
    products = formats_of(weight)
    assert set(products) == {"dense", "csr", "bsr16", "bsr32"}
    for name, product in products.items():
        got = product(x)
        assert torch.allclose(got if name == "dense" else got.T, x @ weight.T, atol=1e-5)


def test_a_language_model_reads_faster_than_it_writes():
    facts = (
        Latency(batch_size=2, repeats=3, formats=False, decode_tokens=4)
        .run(workbench.subject("bytelm"), Progress(), cache=False)
        .facts
    )
    assert facts["prefill_tokens_per_second"] > facts["decode_tokens_per_second"] > 0
    tokens = 2 * 256 / facts["prefill_tokens_per_second"]
    assert 1000 * tokens == pytest.approx(facts["median_ms"])
    read_only = Latency(batch_size=2, repeats=3, formats=False, decode_tokens=0)
    assert "decode_tokens_per_second" not in read_only.run(workbench.subject("bytelm"), cache=False).facts
