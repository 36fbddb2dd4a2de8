"""Operators against dense autograd Hessians, finite differences of gradients,
brute-force Fisher sums and a peer library.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call

import workbench
from tests.conftest import ARCHITECTURES, ROOT
from tests.curvature.small import mlp, stock
from workbench.curvature import curvature_operator
from workbench.curvature.studies.sharpness import moved_loss_and_gradient
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.subjects import Mask, Subject


def dense_hessian(subject: Subject) -> torch.Tensor:
    """The whole Hessian by torch.autograd.functional, in the order of the parameters."""
    names = [n for n, _ in subject.model.named_parameters()]
    values = [p.detach() for p in subject.model.parameters()]
    batch = next(subject.batches("calibration", 10_000))

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = torch.split(flat, [v.numel() for v in values])
        replaced = {n: p.view_as(v) for n, p, v in zip(names, parts, values, strict=True)}
        output = functional_call(subject.model, replaced, (batch["inputs"],))
        return subject.task.criterion(output, batch)

    return torch.autograd.functional.hessian(loss, torch.cat([v.reshape(-1) for v in values]))


def dense(
    subject: Subject, kind: str, batch_size: int = 7, block: bool = False, **options: object
) -> torch.Tensor:
    with curvature_operator(subject, kind, batch_size=batch_size, dtype="float64", **options) as operator:  # type: ignore[arg-type]
        eye = torch.eye(operator.size, dtype=torch.float64)
        return operator.block_matmat(eye) if block else operator.matmat(eye)


@pytest.mark.parametrize("loss", [None, "squared_error"])
def test_hessian_equals_autograd_for_every_micro_batch_size(loss: str | None) -> None:
    subject = mlp(loss=loss)
    exact = dense_hessian(subject)
    for batch_size in (1, 7, 64):
        assert torch.allclose(dense(subject, "hessian", batch_size), exact, atol=1e-12)


@pytest.mark.parametrize("loss", [None, "squared_error"])
def test_gauss_newton_and_fishers_equal_brute_force_sums(loss: str | None) -> None:
    """Per-item Jacobians and gradients, one at a time."""
    subject = mlp(loss=loss, examples=11)
    batch = next(subject.batches("calibration", 100))
    parameters = list(subject.model.parameters())
    size = sum(p.numel() for p in parameters)
    ggn, fisher = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
    for i in range(11):
        one = {k: v[i : i + 1] for k, v in batch.items()}
        z = subject.model(one["inputs"])[0]
        jacobian = torch.stack(
            [
                torch.cat([g.reshape(-1) for g in torch.autograd.grad(c, parameters, retain_graph=True)])
                for c in z
            ]
        )
        p = z.softmax(-1).detach()
        middle = torch.diag(p) - torch.outer(p, p) if loss is None else torch.eye(3, dtype=torch.float64)
        ggn += jacobian.T @ middle @ jacobian / 11
        g = torch.cat([g.reshape(-1) for g in torch.autograd.grad(subject.loss(one), parameters)])
        fisher += torch.outer(g, g) / 11
    for batch_size in (1, 4, 20):
        assert torch.allclose(dense(subject, "ggn", batch_size), ggn, atol=1e-12)
        assert torch.allclose(dense(subject, "empirical-fisher", batch_size), fisher, atol=1e-12)
    sampled = [dense(subject, "mc-fisher", b, samples=3) for b in (1, 4, 20)]
    assert torch.allclose(sampled[0], sampled[1], atol=1e-12) and torch.allclose(
        sampled[0], sampled[2], atol=1e-12
    )
    mean = dense(subject, "mc-fisher", 20, samples=4000)
    assert torch.linalg.norm(mean - ggn) < 0.05 * torch.linalg.norm(ggn)


def test_gauss_newton_of_a_custom_loss_is_the_hessian_of_a_linear_model() -> None:
    """With a linear model J^T S J is the whole Hessian, whatever the loss."""

    def huber(output: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return nn.functional.huber_loss(output, batch["labels"], delta=0.7) + (output**4).mean()

    subject = mlp(loss=huber, widths=(5, 3))
    assert torch.allclose(dense(subject, "ggn", 6), dense(subject, "hessian", 24), atol=1e-12)
    with pytest.raises(BadInput, match="mc-fisher"):
        dense(subject, "mc-fisher")


def test_block_products_are_the_diagonal_blocks() -> None:
    subject = mlp()
    whole = dense(subject, "hessian")
    for kind, reference in (("hessian", whole), ("ggn", dense(subject, "ggn"))):
        found = dense(subject, kind, block=True)
        with curvature_operator(subject, dtype="float64") as operator:
            expected = torch.zeros_like(reference)
            for s in operator.slices:
                expected[s, s] = reference[s, s]
        assert torch.allclose(found, expected, atol=1e-12)


def test_a_layer_glob_is_a_principal_submatrix() -> None:
    subject = mlp()
    whole = dense(subject, "hessian")
    with curvature_operator(subject, dtype="float64") as operator:
        part = torch.cat(
            [
                torch.arange(s.start, s.stop)
                for n, s in zip(operator.names, operator.slices, strict=True)
                if n in ("0.weight", "3.weight")
            ]
        )
    assert torch.allclose(dense(subject, "hessian", layers="0,3"), whole[part][:, part], atol=1e-12)
    assert torch.allclose(
        dense(subject, "hessian", layers="*.bias").diagonal().sum(), sum_of_biases(subject, whole), atol=1e-12
    )


def sum_of_biases(subject: Subject, whole: torch.Tensor) -> torch.Tensor:
    with curvature_operator(subject, dtype="float64") as operator:
        return sum(
            (
                whole.diagonal()[s].sum()
                for n, s in zip(operator.names, operator.slices, strict=True)
                if n.endswith("bias")
            ),
            torch.tensor(0.0),
        )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_products_equal_finite_differences_of_gradients(architecture: str) -> None:
    """float64 throughout, stock classes unedited: (g(w + h v) - g(w - h v)) / 2h, fourth order,
    within 1e-8 relative.
    """
    subject = stock(architecture, torch.float64, examples=4)
    with curvature_operator(subject, examples=4, batch_size=4, dtype="float64") as operator:
        draw = torch.Generator().manual_seed(1)
        v = torch.randn(operator.size, generator=draw, dtype=torch.float64)
        v /= v.norm()
        product = operator.matvec(v)

        def gradient(step: float) -> torch.Tensor:
            found = moved_loss_and_gradient(operator, step * v)[1]
            assert found is not None
            return found

        errors = []
        for h in (3e-4, 1e-4, 3e-5):
            difference = (8 * (gradient(h) - gradient(-h)) - (gradient(2 * h) - gradient(-2 * h))) / (12 * h)
            errors.append(float((difference - product).norm() / product.norm()))
    assert min(errors) < 1e-8, errors


def test_layers_with_affine_norm_match_a_peer_where_it_is_right() -> None:
    """curvlinops agrees to 1e-5 in float32 without the affine LayerNorm weight,
    whose product it gets wrong on this torch.
    """
    curvlinops = pytest.importorskip("curvlinops", reason="the peer library is a development oracle only")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8, elementwise_affine=False), nn.Tanh(), nn.Linear(8, 3)
    )
    data = {"inputs": torch.randn(20, 6), "labels": torch.randint(3, (20,))}
    subject = workbench.subject(
        model, data=dict.fromkeys(("train", "calibration", "validation", "test"), data)
    )
    parameters = dict(model.named_parameters())
    pairs = [(data["inputs"][:10], data["labels"][:10]), (data["inputs"][10:], data["labels"][10:])]
    vectors = torch.randn(3, sum(p.numel() for p in parameters.values()))
    for kind, peer in (("hessian", curvlinops.HessianLinearOperator), ("ggn", curvlinops.GGNLinearOperator)):
        with curvature_operator(subject, kind, batch_size=10) as operator:
            mine = operator.matmat(vectors)
        theirs = (peer(model, nn.CrossEntropyLoss(), list(parameters.values()), pairs) @ vectors.T).T
        assert torch.linalg.norm(mine - theirs) < 1e-5 * torch.linalg.norm(theirs)


def test_tied_weights_count_once_and_unused_ones_are_zero() -> None:
    subject = stock("gpt2")
    with curvature_operator(subject, examples=2) as operator:
        names = operator.names
        assert "transformer.wte.weight" in names and "lm_head.weight" not in names
        assert operator.size == sum(
            p.numel() for p in {id(p): p for p in subject.model.parameters()}.values()
        )

    class Extra(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    data = {"inputs": torch.randn(8, 4), "labels": torch.randint(3, (8,))}
    extra = workbench.subject(
        Extra(), data=dict.fromkeys(("train", "calibration", "validation", "test"), data)
    )
    for kind in ("hessian", "ggn", "empirical-fisher"):
        with curvature_operator(extra, kind) as operator:
            product = operator.matvec(torch.ones(operator.size))
            unused = [
                s for n, s in zip(operator.names, operator.slices, strict=True) if n.startswith("unused")
            ]
        assert all(torch.count_nonzero(product[s]) == 0 for s in unused) and torch.count_nonzero(product)


def test_the_model_is_as_before_afterwards() -> None:
    subject = stock("bert")
    subject.model.train()
    subject.model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    layer = subject.layers()[0]
    layer.attach(Mask(torch.rand(layer.shape) > 0.5))
    before, cls = subject.fingerprint, type(layer.module)
    flags = [p.requires_grad for p in subject.model.parameters()]
    switches = (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled())
    with pytest.raises(KeyboardInterrupt), curvature_operator(subject, examples=4) as operator:
        assert not subject.model.training and type(layer.module) is nn.Linear
        assert "bert.embeddings.word_embeddings.weight" not in operator.names
        operator.matvec(torch.ones(operator.size))
        raise KeyboardInterrupt
    assert subject.model.training and type(layer.module) is cls and subject.fingerprint == before
    assert flags == [p.requires_grad for p in subject.model.parameters()]
    assert switches == (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
    )


@pytest.mark.parametrize("kind", ["hessian", "ggn", "empirical-fisher"])
def test_graphs_kept_between_products_change_nothing(kind: str) -> None:
    subject = stock("bert")
    with curvature_operator(subject, kind, batch_size=2) as operator:
        v = torch.randn(2, operator.size, generator=torch.Generator().manual_seed(0))
        buffer = torch.full_like(v, float("nan"))
        fresh, blocks = operator.matmat(v), operator.block_matmat(v)
        assert len(operator._kept) == 3
        moved_loss_and_gradient(operator, v[0] * 1e-2)
        assert operator.matmat(v, out=buffer) is buffer and torch.allclose(
            buffer, fresh, rtol=1e-4, atol=1e-6 * float(fresh.abs().max())
        )
        assert torch.equal(operator.matmat(v), buffer) and torch.equal(operator.block_matmat(v), blocks)
        operator.forget()
        assert torch.equal(operator.matmat(v), buffer)
    assert not operator._kept


def test_the_weight_of_a_graph_is_what_it_saves() -> None:
    from workbench.curvature.operators.graphs import weighed

    model = nn.Linear(5, 3).double()
    with weighed(model) as size:
        y = model(torch.ones(7, 5, dtype=torch.float64)).exp()
    assert (
        size == [7 * 5 * 8 + 7 * 3 * 8] and y.requires_grad
    )  # the layer's inputs and the exponentials; not its weight


def test_padding_only_batches_and_uneven_items_are_weighted_exactly() -> None:
    subject = stock("llama", torch.float64)
    subject.splits["calibration"]["labels"][2:4] = -100
    v = None
    products = []
    for batch_size in (1, 2, 6):
        with curvature_operator(subject, batch_size=batch_size, dtype="float64") as operator:
            v = torch.linspace(-1, 1, operator.size, dtype=torch.float64) if v is None else v
            products.append(operator.matvec(v))
    assert torch.allclose(products[0], products[1], rtol=1e-9, atol=1e-12) and torch.allclose(
        products[0], products[2], rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (dict(kind="jacobian"), "jacobian"),
        (dict(layers="nothing*"), "nothing"),
        (dict(split="dev"), "'dev' does not exist"),
        (dict(examples=0), "at least 1"),
    ],
)
def test_bad_requests_are_named_first(change: dict[str, object], word: str) -> None:
    with pytest.raises(BadInput, match=word), curvature_operator(mlp(), **change):  # type: ignore[arg-type]
        pass


def test_hopeless_models_and_losses_are_refused_in_words() -> None:
    frozen = mlp()
    frozen.model.requires_grad_(False)
    with pytest.raises(BadInput, match="no trainable parameter"), curvature_operator(frozen):
        pass

    def rounded(output: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return (output.argmax(-1) != 0).double().mean()

    with curvature_operator(mlp(loss=rounded)) as operator, pytest.raises(BadInput, match="differentiably"):
        operator.matvec(torch.ones(operator.size))
    broken = mlp()
    with torch.no_grad():
        broken.model[0].weight.fill_(float("nan"))
    for kind in ("hessian", "ggn"):
        with curvature_operator(broken, kind) as operator, pytest.raises(BadInput, match="finite"):
            operator.matvec(torch.ones(operator.size))


def test_item_noise_is_the_variance_of_single_items() -> None:
    """V = sum over entries of the variance of one item's matrix, from the spread of micro-batches
    (here: of one item each).
    """
    subject = mlp(examples=24)
    with curvature_operator(subject, batch_size=1, dtype="float64") as operator:
        eye = torch.eye(operator.size, dtype=torch.float64)
        full = operator.matmat(eye)
        found = operator.noise(full) * operator.size  # type: ignore[operator]
    total = 0.0
    for i in range(24):
        one = {s: {k: v[i : i + 1] for k, v in split.items()} for s, split in subject.splits.items()}
        total += float((dense(workbench.subject(subject.model, data=one), "hessian") - full).square().sum())
    assert found == pytest.approx(total / 23, rel=1e-9)


DISTRIBUTED = """
import sys, torch, torch.distributed as dist
from tests.curvature.small import stock
from workbench.curvature import curvature_operator
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
found = {}
for kind in ("hessian", "ggn", "mc-fisher"):
    with curvature_operator(stock("bert"), kind, examples=6, batch_size=2) as operator:
        v = torch.randn(2, operator.size, generator=torch.Generator().manual_seed(0))
        found[kind] = operator.matmat(v)
        found[kind + "-noise"] = torch.tensor(operator.noise(found[kind]))
from safetensors.torch import save_file
save_file(found, f"{folder}/rank{rank}.safetensors")
"""


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    processes = [
        subprocess.Popen([sys.executable, "-c", DISTRIBUTED, str(rank), str(tmp_path)], cwd=ROOT)
        for rank in (0, 1)
    ]
    alone = {}
    for kind in ("hessian", "ggn", "mc-fisher"):
        with curvature_operator(stock("bert"), kind, examples=6, batch_size=2) as operator:
            alone[kind] = operator.matmat(
                torch.randn(2, operator.size, generator=torch.Generator().manual_seed(0))
            )
            alone[kind + "-noise"] = torch.tensor(operator.noise(alone[kind]))
    assert [p.wait(300) for p in processes] == [0, 0]
    first, second = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1))
    for key in alone:
        assert torch.equal(first[key], second[key])
        assert torch.linalg.norm(first[key] - alone[key]) <= 1e-5 * torch.linalg.norm(alone[key])


def test_stop_is_noticed_inside_a_product() -> None:
    from workbench.curvature.operators.curvature_operator import Stopped

    progress = Progress()
    with curvature_operator(mlp(), batch_size=4, progress=progress) as operator:
        progress.stop.set()
        with pytest.raises(Stopped):
            operator.matvec(torch.ones(operator.size))
