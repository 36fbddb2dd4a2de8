"""An axis: choices with options of their own, in every way in which they can be written."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from workbench.axis import AXES, Axis, Choice, Fields, Options, parameter
from workbench.errors import BadInput


class Damped(Options):
    damp: float = parameter(0.01, "share of the mean diagonal", gt=0)
    block: int = parameter(50, "weights in a block", ge=1)


@pytest.fixture(scope="module")
def settings() -> Iterator[type[Fields]]:
    home = Axis("test-scoring", "what a removal costs")

    @home.add("size", formula="|w|", source="Han et al. 2015")
    def size(weight: float, options: Options) -> float:
        return abs(weight)

    @home.add("fisher", formula="w^2 / damp", source="Kurtic et al. 2022", needs="gradients", options=Damped)
    def fisher(weight: float, options: Damped) -> float:
        return weight**2 / options.damp

    class Settings(Fields):
        method: str = parameter("plain", "what fills the rest")
        sparsity: float = parameter(0.5, "share", ge=0, lt=1)
        scoring: Choice = home.choice("fisher")
        second: Choice = home.choice(None)

        @classmethod
        def renamed(cls) -> Mapping[str, str]:
            return {"share": "sparsity", "damping": "scoring.damp"}

        @classmethod
        def filled(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
            return {"second": "size" if given.get("method", "plain") == "plain" else "fisher"}

    yield Settings
    del AXES["test-scoring"]


def test_a_choice_is_written_as_name_mapping_or_dotted_option(settings: Any) -> None:
    plain = settings()
    assert plain.scoring == "fisher" and plain.scoring.options.damp == 0.01
    assert settings(scoring={"name": "fisher", "damp": 0.1}) == settings(**{"scoring.damp": 0.1})
    assert settings(**{"scoring": "fisher", "scoring.block": 7}).scoring.options == Damped(block=7)
    assert settings(scoring="size").scoring(-3.0) == 3.0
    assert settings(**{"scoring.damp": 0.5}).scoring(2.0) == 8.0


def test_values_survive_json_pickle_and_copies(settings: Any) -> None:
    made = settings(**{"scoring.damp": 0.2, "sparsity": 0.7})
    assert settings(**json.loads(json.dumps(made.model_dump(mode="json")))) == made
    assert copy.deepcopy(made) == made and pickle.loads(pickle.dumps(made.scoring)) == made.scoring
    assert hash(made.scoring) == hash(settings().scoring) and made.scoring != settings().scoring


def test_what_was_not_given_follows_from_what_was(settings: Any) -> None:
    assert settings().second == "size" and settings(method="other").second == "fisher"
    assert settings(method="other", second="size").second == "size"
    assert settings(method="other").model_fields_set == {"method"}


def test_a_wrong_choice_says_what_is_accepted(settings: Any) -> None:
    for given, words in (
        ({"scoring": "fishr"}, "did you mean fisher"),
        ({"scoring": {"name": "size", "damp": 1}}, "it is an option of fisher"),
        ({"scoring.damp": -1}, "scoring.damp: -1 is not accepted, it should be greater than 0"),
        ({"sparsity.damp": 1}, "fields with options: scoring, second"),
        ({"sparsty": 0.1}, "did you mean sparsity"),
        ({"scoring": 3}, "should be a name"),
        ({"scoring": {"damp": 1}}, "has no name"),
    ):
        with pytest.raises(BadInput, match=words.replace("|", r"\|")):
            settings(**given)


def test_names_of_one_release_ago_work_and_say_the_new_one(settings: Any) -> None:
    with pytest.warns(FutureWarning, match="is called sparsity now"):
        assert settings(share=0.3).sparsity == 0.3
    with pytest.warns(FutureWarning, match=r"write scoring\.damp"):
        assert settings(damp=0.3).scoring.options.damp == 0.3
    with pytest.warns(FutureWarning, match="is called scoring.damp now"):
        assert settings(damping=0.3).scoring.options.damp == 0.3
    with pytest.warns(FutureWarning, match="no effect with scoring size"):
        assert settings(scoring="size", damp=0.3).scoring == "size"
    with pytest.warns(FutureWarning, match="leave it out"):
        assert settings(scoring="preset").scoring == "fisher"


def test_a_name_is_registered_once(settings: Any) -> None:
    home = AXES["test-scoring"]
    with pytest.raises(BadInput, match="registered already"):
        home.add("size", formula="", source="")(len)
    home.add("size", formula="|w|", source="Han et al. 2015")(home["size"].value)  # a cell that is run again
