"""Method cards of weights as arithmetic; those of each axis are beside its entries."""

from __future__ import annotations

from workbench.arithmetic.difference.method_cards import METHODS as DIFFERENCES
from workbench.arithmetic.growth.method_cards import METHODS as GROWN
from workbench.arithmetic.merging.method_cards import METHODS as MERGING
from workbench.names import Method

METHODS: list[Method] = [*MERGING, *DIFFERENCES, *GROWN]
