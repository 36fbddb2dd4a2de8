"""What the columns of a batch are. A task declares it; trimming, counting, averages, calibration masks and
exported files follow the declaration, and nothing is guessed from a tensor's shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Role = Literal["tokens", "mask", "places", "values", "targets"]


@dataclass(frozen=True)
class Column:
    """One column of a batch, a tensor whose first dimension is the example.

    role : tokens (ids of a vocabulary), mask (1 at what is real, 0 at padding), places (numbers that belong
        to positions: types, positions, languages), values (pixels, features), targets
    sequence : the sequence that the second dimension runs along; "" when it runs along none
    """

    role: Role
    sequence: str = ""

    @property
    def exported(self) -> torch.dtype | None:
        """The dtype of this column where a file fixes one; None: the column's own."""
        return torch.int64 if self.role in ("tokens", "mask", "places") else None


SOURCE, TARGET = "source", "target"

#: What a model of one text reads; the targets are the task's.
TEXT: Mapping[str, Column] = {
    "input_ids": Column("tokens", SOURCE),
    "attention_mask": Column("mask", SOURCE),
    "token_type_ids": Column("places", SOURCE),
    "position_ids": Column("places", SOURCE),
    "langs": Column("places", SOURCE),
    "bbox": Column("places", SOURCE),
    "global_attention_mask": Column("places", SOURCE),
    "inputs_embeds": Column("values", SOURCE),
}

#: What the decoder of an encoder-decoder reads besides.
DECODED: Mapping[str, Column] = {
    "decoder_input_ids": Column("tokens", TARGET),
    "decoder_attention_mask": Column("mask", TARGET),
    "decoder_position_ids": Column("places", TARGET),
}


def ends(real: Tensor) -> int:
    """How many positions some example uses, of real (examples, positions); at least 1."""
    used = real.any(0).nonzero()
    return int(used[-1]) + 1 if len(used) else 1
