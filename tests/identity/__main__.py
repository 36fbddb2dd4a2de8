"""`python -m tests.identity [METHOD ...]`: run the pairs whose peers are installed, store their records."""

from __future__ import annotations

import sys

import torch

from tests.identity.pairs import every_pair, installed, measured, store
from workbench.names import methods
from workbench.storage.identity import OTHERS, identity_kind, identity_sentence


def main(chosen: list[str]) -> None:
    torch.set_num_threads(1)
    for pair in every_pair():
        names = [name for name in pair.methods if not chosen or name in chosen]
        version = installed(pair) if names else ""
        if version is None:
            print(f"{', '.join(names)}: {pair.peer} is not installed")
        elif names:
            record = measured(pair, version)
            print(f"{', '.join(names)}: {identity_sentence(record)}", flush=True)
            for name in names:
                store(name, record)
    for family in sorted({card.family for card in methods().values()}):
        kinds = [identity_kind(name) for name, card in methods().items() if card.family == family]
        found, others = [kind for kind in kinds if kind], [kind for kind in kinds if kind in OTHERS]
        print(f"{family}: {len(found)} of {len(kinds)} methods, {len(others)} beside others' code")


main(sys.argv[1:])
