"""What llama.cpp printed of a stored pair, against `fidelity` and against the definitions in double."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.identity.llama_cpp import RUN, Pair, as_stored, digit, ours, plain, printed, stored_pair

PRINTED = printed("\n".join(RUN["printed"]))
#: Printed of both sides' losses; there is no such measure here.
CORRELATION = "Cor(ln(PPL(Q)), ln(PPL(base)))"


@pytest.fixture(scope="module")
def pair() -> Pair:
    return stored_pair()


@pytest.fixture(scope="module")
def measured(pair: Pair) -> dict[str, float]:
    return ours(as_stored(pair))


def test_nothing_that_is_printed_is_left_out(measured: dict[str, float]) -> None:
    assert {*PRINTED} == {*measured, CORRELATION} and len(PRINTED) == 31


@pytest.mark.parametrize("label", [label for label in PRINTED if label != CORRELATION])
def test_printed_numbers_are_ours_to_their_last_digit(measured: dict[str, float], label: str) -> None:
    """Half of it is their rounding; both sides compute in single precision."""
    number, _ = PRINTED[label]
    assert measured[label] == pytest.approx(float(number), abs=digit(number), rel=0)


def test_the_base_as_it_is_stored_is_no_distribution(pair: Pair, measured: dict[str, float]) -> None:
    """Why `as_stored` is needed: what 16 bits hold does not sum to 1 within the printed digits."""
    totals = np.exp(pair.log_p.astype(np.float64)).sum(-1)
    assert 1e-5 < np.abs(totals - 1).max() < 1e-3
    gap = abs(ours(plain(pair))["Mean KLD"] - measured["Mean KLD"])
    assert 1e-5 < gap < 1e-4


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    below = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    log_p: NDArray[np.float64] = below - np.log(np.exp(below).sum(-1, keepdims=True))
    return log_p


def test_printed_numbers_and_errors_are_the_definitions_in_double(pair: Pair) -> None:
    """A second derivation, with the standard errors as if tokens were independent, n - 1 for n."""
    p, q = pair.log_p.astype(np.float64), log_softmax(pair.logits)
    rows, count = np.arange(len(p)), len(p)
    kl = np.where(pair.counted, np.exp(p) * (p - q), 0).sum(-1)
    base, other = -p[rows, pair.targets], -q[rows, pair.targets]
    moved = 100 * (np.exp(-other) - np.exp(-base))
    same = 100.0 * (p.argmax(-1) == q.argmax(-1))

    def error(values: NDArray[np.float64]) -> float:
        return float(values.std() / np.sqrt(count - 1))

    shared = ((base * other).mean() - base.mean() * other.mean()) / (count - 1)
    changed, dense, rms = np.exp(other.mean()), np.exp(base.mean()), np.sqrt(np.square(moved).mean())
    ratio = (other - base).mean()
    one, two = changed * error(other), dense * error(base)
    want = {
        "Mean PPL(Q)": (changed, one),
        "Mean PPL(base)": (dense, two),
        CORRELATION: (100 * shared / (error(base) * error(other)), None),
        "Mean ln(PPL(Q)/PPL(base))": (ratio, error(other - base)),
        "Mean PPL(Q)/PPL(base)": (np.exp(ratio), np.exp(ratio) * error(other - base)),
        "Mean PPL(Q)-PPL(base)": (
            changed - dense,
            np.sqrt(one**2 + two**2 - 2 * changed * dense * shared),
        ),
        "Mean KLD": (kl.mean(), error(kl)),
        "Mean Δp": (moved.mean(), error(moved)),
        "RMS Δp": (rms, error(np.square(moved)) / (2 * rms)),
        "Same top p": (same.mean(), error(same)),
    }
    for name, values in (("KLD", kl), ("Δp", moved)):
        want |= {
            f"Maximum {name}": (values.max(), None),
            f"Minimum {name}": (values.min(), None),
            f"Median {name}": (np.median(values), None),
        }
        shares = [label.split("%")[0] for label in PRINTED if label.endswith(f"% {name}")]
        want |= {f"{share}% {name}": (np.quantile(values, float(share) / 100), None) for share in shares}
    assert {*want} == {*PRINTED}
    for label, (value, uncertainty) in want.items():
        number, spread = PRINTED[label]
        assert value == pytest.approx(float(number), abs=0.6 * digit(number), rel=0), label
        assert bool(spread) == (uncertainty is not None), label
        if spread:
            assert uncertainty == pytest.approx(float(spread), abs=0.6 * digit(spread), rel=0), label
