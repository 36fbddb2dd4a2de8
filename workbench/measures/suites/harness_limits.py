"""What the harness may do while it works for us: no log lines, no network, no code in templates."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, the harness logs nothing below an error and draws no bars."""
    import lm_eval.api.task
    from datasets.utils import disable_progress_bars, enable_progress_bars
    from datasets.utils.tqdm import are_progress_bars_disabled

    logs = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    before, bars = [log.level for log in logs], not are_progress_bars_disabled()
    for log in logs:
        log.setLevel(logging.ERROR)
    disable_progress_bars()
    bar = lm_eval.api.task.tqdm
    lm_eval.api.task.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = bar
        for log, level in zip(logs, before, strict=True):
            log.setLevel(level)
        if bars:
            enable_progress_bars()


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Inside, neither `datasets` nor the hub's client goes to the network."""
    import datasets.config
    import huggingface_hub.constants

    places = [
        (module, name)
        for module in (datasets.config, huggingface_hub.constants)
        for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE")
        if hasattr(module, name)
    ]
    before = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, True)
    try:
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


@contextlib.contextmanager
def sandboxed() -> Iterator[None]:
    """Inside, the harness renders its templates where they reach no attribute that leads to code."""
    import lm_eval.utils
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    plain = lm_eval.utils.env
    safe = ImmutableSandboxedEnvironment(
        loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True
    )
    safe.filters |= {name: value for name, value in plain.filters.items() if name not in safe.filters}
    lm_eval.utils.env = safe
    try:
        yield
    finally:
        lm_eval.utils.env = plain
