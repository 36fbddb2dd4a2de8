"""The model that the lm-evaluation-harness asks: a subject with its own tokenizer, nothing loaded again."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from workbench.errors import BadInput
from workbench.measures.suites.continuations import (
    Answer,
    Batch,
    Measure,
    Pair,
    Placed,
    answered,
    longest,
)
from workbench.progress import Progress
from workbench.subjects import Subject
from workbench.unfinished.finished_parts import FinishedParts


class Interrupted(Exception):
    """Somebody asked to stop before all requests were answered."""


@functools.lru_cache(1)
def model_class() -> Any:
    """The class, made on first use: its base is the harness's own, which is an extra."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import has_bos_prefix
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class SubjectModel(TemplateLM):
        """Answers loglikelihood and loglikelihood_rolling requests with a subject."""

        def __init__(
            self,
            on: Subject,
            tokenizer: Any,
            tokens: int = 2048,
            progress: Progress | None = None,
            label: str = "answer",
            finished: FinishedParts | None = None,
        ) -> None:
            super().__init__()
            self.on, self.tokenizer, self.tokens = on, tokenizer, tokens
            self.progress, self.label, self.finished = progress or Progress(), label, finished
            self._device = on.device
            self.answering = False  # what fails then is not the task's

        @property
        def eot_token_id(self) -> int:
            end: int | None = self.tokenizer.eos_token_id
            return self.prefix_token_id if end is None else end

        @property
        def prefix_token_id(self) -> int:
            """What a text without a context comes after: the token that begins a text, else the one that
            ends it.
            """
            found = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
            known = [token for token in found if token is not None]
            if not known:
                raise BadInput(
                    "subject: its tokenizer has no token that begins or ends a text, which a text without a "
                    "context needs; set bos_token or eos_token in tokenizer_config.json"
                )
            return int(known[0])

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **more: Any) -> list[int]:
            """Token ids; as the tokenizer is set where nothing is asked for, without a second first token."""
            given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            if add_special_tokens is None and self.begins(string):
                given = {"add_special_tokens": False}
            ids: list[int] = self.tokenizer.encode(string, **given)
            return ids

        def begins(self, string: str) -> bool:
            first = self.tokenizer.bos_token_id
            return first is not None and bool(has_bos_prefix(string, self.tokenizer.decode(first)))

        def answers(self, pairs: list[Pair]) -> list[Answer]:
            def track(work: list[Batch]) -> Iterable[Batch]:
                return self.progress.track(work, self.label, len(work))

            def remembered(batch: int, measure: Measure) -> list[Placed]:
                if self.finished is None:
                    return measure()
                known = self.finished.get(f"{self.label} {batch}", lambda: {"answers": measure()})
                assert known is not None
                return [(place, (log_p, greedy)) for place, (log_p, greedy) in known["answers"]]

            self.answering = True
            found = answered(self.on, pairs, self.tokens, track, remembered)
            known = [answer for answer in found if answer is not None]
            if len(known) < len(found):
                raise Interrupted
            self.answering = False
            return known

        def _loglikelihood_tokens(self, requests: Any, **options: Any) -> list[Answer]:
            pairs = [(context or [self.prefix_token_id], tokens) for _, context, tokens in requests]
            return self.answers(pairs)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[Answer]:
            found: list[Answer] = super().loglikelihood(requests, disable_tqdm=True)
            return found

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
            """ln p of whole texts; windows as long as the model reads, each token said once."""
            windows: list[Pair] = []
            owner: list[int] = []
            for place, request in enumerate(requests):
                parts = get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, longest(self.on), 1
                )
                mine = [make_disjoint_window(part) for part in parts]
                windows += mine
                owner += [place] * len(mine)
            sums = [0.0] * len(requests)
            for place, (log_p, _) in zip(owner, self.answers(windows), strict=True):
                sums[place] += log_p
            return sums

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
            raise BadInput("tasks: texts are not generated here; refused before a run")

        @property
        def tokenizer_name(self) -> str:
            return str(self.tokenizer.name_or_path).replace("/", "__")

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            said: str = self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
            return said

    return SubjectModel
