"""The inputs of every layer, seen where the multiplication happens.

A `TorchFunctionMode` watches `linear`, `addmm`, `matmul`, `bmm` and recognises a layer's weight by its
storage. So plain linears, GPT-2's Conv1D and the slices of fused expert weights are captured the same way,
and an expert's statistics hold only the tokens routed to it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from scipy.linalg.blas import ssyrk
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.subjects import Batch, Layer, Subject
from workbench.subjects.columns import SOURCE, TARGET
from workbench.subjects.tasks import first_tensor

Handler = Callable[[Layer, int, Tensor], None]  # layer, expert (0 for a plain matrix), inputs (tokens, in)


class WeightCalls(TorchFunctionMode):
    """Sees the functions that the given layers' weights go through;
    while it is on, a weight is one tensor, known by its storage.

    `seen` says what is kept of a layer and its weight; `found` gives it back for a tensor that lies in that
    weight's storage.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.layers = list(layers)

    def __enter__(self) -> Self:
        self._cached = parametrize.cached()  # a new one each time: a mode may be entered again
        self._cached.__enter__()
        self._by_storage = {}
        for layer in self.layers:
            value = getattr(layer.module, layer.tensor)
            self._by_storage[value.untyped_storage().data_ptr()] = self.seen(layer, value)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._cached.__exit__(*error)

    def seen(self, layer: Layer, value: Tensor) -> Any:
        return layer, value

    def found(self, weight: Any) -> Any:
        return (
            self._by_storage.get(weight.untyped_storage().data_ptr()) if isinstance(weight, Tensor) else None
        )


@dataclass(frozen=True, eq=False)
class Kept:
    """Which positions of an encoder-decoder's two sequences are real.

    source, target : (examples, positions) True where there is no padding
    encoder : the module inside which everything runs along the source, as does what it gives
    """

    source: Tensor
    target: Tensor
    encoder: nn.Module


class InputCapture(WeightCalls):
    """Calls `handler(layer, expert, inputs)` whenever a layer multiplies;
    inputs are detached, shape (tokens, in).

    Padding is dropped when `keep` (see `kept_positions`) is set and the input has its leading dimensions. Of
    an encoder-decoder, what runs inside the encoder and what reads the encoder's answer (the keys and values
    of cross-attention) follows the source, all else the target.
    """

    def __init__(self, layers: Sequence[Layer], handler: Handler) -> None:
        super().__init__(layers)
        self.handler = handler
        self._keep: Tensor | Kept | None = None
        self._hooks: list[Any] = []
        self._inside, self._answer = False, list[Tensor]()  # of the encoder
        self._kept: tuple[Any, int, Tensor | None, Tensor] | None = None
        self._places: tuple[Tensor, Tensor] | None = None

    @property
    def keep(self) -> Tensor | Kept | None:
        return self._keep

    @keep.setter
    def keep(self, keep: Tensor | Kept | None) -> None:
        self._keep, self._answer = keep, []
        self._unhook()
        if isinstance(keep, Kept):
            self._hooks = [
                keep.encoder.register_forward_pre_hook(self._enter_encoder),
                keep.encoder.register_forward_hook(self._leave_encoder),
            ]

    def _enter_encoder(self, module: nn.Module, inputs: Any) -> None:
        self._inside = True

    def _leave_encoder(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._inside, self._answer = False, [first_tensor(output)]

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._inside = [], False

    def _mask_of(self, inputs: Tensor) -> Tensor | None:
        """The mask of the sequence that these inputs run along."""
        keep = self._keep
        if not isinstance(keep, Kept):
            return keep
        reads_source = self._inside or any(
            inputs.data_ptr() == answer.data_ptr() and inputs.shape == answer.shape for answer in self._answer
        )
        first, second = (keep.source, keep.target) if reads_source else (keep.target, keep.source)
        return second if fits(inputs, second) and not fits(inputs, first) else first

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "linear":
            self._see(args[1] if len(args) > 1 else kwargs["weight"], args[0] if args else kwargs["input"])
        elif name == "addmm" and len(args) >= 3:
            self._see(args[2], args[1])
        elif name in ("matmul", "mm", "bmm", "__matmul__") and len(args) == 2:
            self._see(args[1], args[0])
        return func(*args, **kwargs)

    def _see(self, weight: Any, inputs: Any) -> None:
        found = self.found(weight)
        if found is None or not isinstance(inputs, Tensor):
            return
        layer, value = found
        if value.ndim == 3:
            expert = (weight.storage_offset() - value.storage_offset()) // value.stride(0)
            if weight.ndim == 3:  # every expert at once: (experts, tokens, in)
                for index in range(weight.shape[0]):
                    self.handler(layer, index, inputs[index].detach())
                return
        else:
            expert = 0
        keep = self._mask_of(inputs)
        version = version_of(inputs)
        if (
            self._kept is None
            or self._kept[0] is not inputs
            or self._kept[1] != version
            or self._kept[2] is not keep
        ):
            self._kept = (
                inputs,
                version,
                keep,
                self._rows(inputs.detach(), keep),
            )  # layers that read one tensor are handed one tensor
        self.handler(layer, expert, self._kept[3])

    def _rows(self, rows: Tensor, keep: Tensor | None) -> Tensor:
        if keep is None or not fits(rows, keep):
            return rows.reshape(-1, rows.shape[-1])
        if rows.ndim >= 3:
            rows = rows.flatten(0, 1)
        if self._places is None or self._places[0] is not keep:
            self._places = (keep, keep.reshape(-1).nonzero()[:, 0])  # found once a batch
        places = self._places[1]
        if len(places) < len(rows):
            rows = rows.index_select(0, places)
        return rows.reshape(-1, rows.shape[-1])

    def __exit__(self, *error: Any) -> None:
        self._kept = self._places = None
        self.keep = None
        super().__exit__(*error)


def version_of(tensor: Tensor) -> int:
    """A number that moves when the tensor is written to."""
    return -1 if tensor.is_inference() else tensor._version


def fits(rows: Tensor, keep: Tensor) -> bool:
    """Whether inputs (batch, length, ..., in) or (batch * length, in) run along keep (batch, length)."""
    if rows.ndim >= 3:
        return rows.shape[:2] == keep.shape
    return rows.ndim == 2 and len(rows) == keep.numel()


@dataclass
class InputMoments:
    """Sums over calibration tokens of one layer's inputs x (tokens, in), for each expert of a stacked weight.

    gram : (experts, in, in) sum of x x^T, or None when only the diagonal was asked for
    square : (experts, in) sum of x^2;  total : (experts, in) sum of x;  tokens : (experts,)
    """

    gram: Tensor | None
    square: Tensor
    total: Tensor
    tokens: Tensor = field(default_factory=lambda: torch.zeros(1))

    @property
    def norm(self) -> Tensor:
        """(experts, in) Euclidean norm of each input feature over the calibration tokens."""
        return self.square.sqrt()


def moments_of(layer: Layer, gram: bool, dtype: torch.dtype = torch.float32) -> InputMoments:
    experts, width = (layer.shape[0] if len(layer.shape) == 3 else 1), layer.shape[-1]
    device = layer.original.device
    zeros = [torch.zeros(experts, width, dtype=dtype, device=device) for _ in range(2)]
    full = torch.zeros(experts, width, width, dtype=dtype, device=device) if gram else None
    return InputMoments(full, zeros[0], zeros[1], torch.zeros(experts, device=device))


BLOCK = 256  # columns of one matrix product of a second moment


class Reached(Exception):
    """Raised to leave a forward pass once what was waited for has run."""


def add_upper(gram: Tensor, rows: Tensor) -> None:
    """Add rows^T rows of rows (tokens, in) to `gram` (in, in), contiguous:
    the entries on and above the diagonal alone, half the work of all.

    torch has no symmetric product. Of one thread it is BLAS's, else products of blocks of columns: BLAS keeps
    threads of its own, which go on waiting for work on the cores that torch's need (the next product of two
    threads took 2.3 times as long).
    """
    alone = gram.device.type == "cpu" and torch.get_num_threads() == 1
    if alone and gram.dtype == torch.float32 and len(rows):
        target = gram.numpy().T  # BLAS counts from the other corner: the lower part of the transpose
        assert np.shares_memory(
            ssyrk(1.0, rows.contiguous().numpy().T, beta=1.0, c=target, lower=1, overwrite_c=1), target
        )
        return
    for start in range(0, rows.shape[1], BLOCK):
        gram[start : start + BLOCK, start:].addmm_(rows[:, start : start + BLOCK].T, rows[:, start:])


def mirror(gram: Tensor) -> None:
    """Fill (..., in, in) below the diagonal from what is above it, in place."""
    for start in range(0, gram.shape[-1], BLOCK):
        end = start + BLOCK
        gram[..., end:, start:end] = gram[..., start:end, end:].mT
        corner = gram[..., start:end, start:end]
        corner.copy_(corner.triu() + corner.triu(1).mT)


def kept_positions(on: Subject, batch: Batch) -> Tensor | Kept | None:
    """Which positions of a batch hold no padding, by the columns that its task declares: (examples,
    positions) of the one sequence, those of source and target in an encoder-decoder, None without a mask.
    """
    real = on.task.real(batch)
    encoder = encoder_of(on.model) if TARGET in real else None
    if encoder is not None:
        source = real.get(SOURCE)
        if source is None:
            source = torch.ones_like(batch["input_ids"], dtype=torch.bool)
        return Kept(source, real[TARGET], encoder)
    return next(iter(real.values())) if len(real) == 1 else None


def encoder_of(model: nn.Module) -> nn.Module | None:
    """The module that reads an encoder-decoder's source."""
    find = getattr(getattr(model, "module", model), "get_encoder", None)
    found = find() if find is not None else None
    return found if isinstance(found, nn.Module) and found is not model else None


def block_positions(on: Subject, name: str, batch: Batch) -> Tensor | None:
    """(examples, positions) True where what the block or layer `name` gives is no padding."""
    keep = kept_positions(on, batch)
    if not isinstance(keep, Kept):
        return keep
    inside = any(on.model.get_submodule(name) is module for module in keep.encoder.modules())
    return keep.source if inside else keep.target


class MomentSums:
    """Adds up the inputs that a capture hands over, into `sums`.

    What several layers read (query, key, value) is multiplied once: `shared` holds the layers whose inputs
    another one was seen to read too, and the product of theirs is kept until the next. Others' products are
    added where they belong without being held. A pass may end early, by `Reached`, once every layer has had
    all its inputs: known when the first pass met each layer exactly once, and the last layer gets as many
    rows as the first (an expert, or a part of the tokens, would get fewer). Without `leaves` it goes on.
    """

    def __init__(self, sums: dict[str, InputMoments], leaves: bool = True) -> None:
        self.sums, self.shared, self.leaves = sums, set[str](), leaves
        self.met: list[tuple[str, int]] = []  # layer and rows of every call of this pass
        self.once: bool | None = None
        self.last: tuple[str, Tensor, Any, InputMoments | None, int] | None = (
            None  # layer, its rows, their storage, their own sums when they are shared, their version
        )

    def begin(self) -> None:
        """Before each pass."""
        if self.met and self.once is None:
            self.once = sorted(name for name, _ in self.met) == sorted(self.sums)
        self.met, self.last = [], None

    def add(self, layer: Layer, expert: int, rows: Tensor) -> None:
        mine, own = self.sums[layer.name], None
        if (
            self.last is not None
            and self.last[2] is rows.untyped_storage()
            and self.last[1].data_ptr() == rows.data_ptr()
            and self.last[1].shape == rows.shape
            and self.last[4] == version_of(rows)
        ):
            leader, own = self.last[0], self.last[3]
            self.shared.add(leader)
        else:
            leader = layer.name
        if own is None and leader in self.shared:
            own = InputMoments(
                *(  # type: ignore[arg-type]
                    None if t is None else torch.zeros_like(t[:1])
                    for t in (mine.gram, mine.square, mine.total)
                )
            )
            accumulate(own, 0, rows)
        if own is None:
            accumulate(mine, expert, rows)
        else:
            for total, part in ((mine.gram, own.gram), (mine.square, own.square), (mine.total, own.total)):
                if total is not None and part is not None:
                    total[expert] += part[0]
        mine.tokens[expert] += len(rows)
        self.last = (leader, rows, rows.untyped_storage(), own, version_of(rows))
        self.met.append((layer.name, len(rows)))
        if self.leaves and self.once and len(self.met) == len(self.sums) and len(rows) == self.met[0][1]:
            raise Reached


def accumulate(sums: InputMoments, expert: int, rows: Tensor) -> None:
    rows = rows.to(sums.total.dtype)
    if sums.gram is None:
        sums.square[expert] += rows.square().sum(0)
    else:
        add_upper(sums.gram[expert], rows)  # its diagonal is the sum of squares
    sums.total[expert] += rows.sum(0)


@torch.no_grad()
def second_moments(
    subject: Subject,
    layers: Sequence[Layer],
    split: str = "calibration",
    examples: int = 128,
    batch_size: int = 16,
    gram: bool = True,
    progress: Progress | None = None,
) -> dict[str, InputMoments]:
    """One streaming pass over `examples` of a split: name -> input moments; padding positions are left out.

    Examples go through the model shortest first, so that there is little padding to compute, and no further
    than to the last of the layers. Layers that read the same tensor share one product,
    of which only the blocks on and above the diagonal are computed.
    """
    progress = progress or Progress()
    found = {layer.name: moments_of(layer, gram) for layer in layers}
    sums = MomentSums(found)
    total = -(-min(examples, subject.size(split)) // batch_size)
    with InputCapture(layers, sums.add) as capture:
        for batch in progress.track(
            subject.batches(split, batch_size, examples, by_length=True), "calibration inputs", total
        ):
            capture.keep = kept_positions(subject, batch)
            sums.begin()
            with contextlib.suppress(Reached):
                subject.task.output(subject.model, batch)
    return completed(found, split)


def completed(found: dict[str, InputMoments], split: str) -> dict[str, InputMoments]:
    """What `MomentSums` leaves out, filled in place: below the diagonal, and the sums of squares on it.
    `BadInput` where an input was not finite.
    """
    for each in found.values():
        if each.gram is not None:
            mirror(each.gram)
            each.square.copy_(each.gram.diagonal(dim1=-2, dim2=-1))
    check_moments(found, split)
    return found


def check_moments(found: Mapping[str, InputMoments], split: str) -> None:
    """Raise `BadInput` naming the first layer whose inputs have no finite second moment."""
    for name, moments in found.items():
        if not (moments.square.isfinite().all() and moments.total.isfinite().all()):
            raise BadInput(
                f"subject: the second moment of the inputs of layer {name!r} on the split {split!r} is not "
                "finite; leave out examples that are not finite, or scale the weights before it down"
            )
