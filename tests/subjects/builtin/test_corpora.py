"""Text from the standard library: what is in it, and that no file is in two splits."""

import functools
from collections import Counter

import numpy as np
import pytest
import torch

from workbench.subjects.builtin import corpora
from workbench.subjects.builtin.corpora import Document


@functools.lru_cache(1)
def library():
    return corpora.standard_library()


def test_the_library_is_there_and_each_document_once():
    names = [document.name for document in library()]
    assert len(names) == len(set(names)) > 500 and names == sorted(names)
    assert {"asyncio/events.py", "dataclasses.py", "pydoc_data/topics/while"} <= set(names)
    assert sum(len(document.text) for document in library()) > 5e6


@pytest.mark.parametrize(
    "part", ["/test/", "/tests/", "site-packages", "dist-packages", "_sysconfigdata", "topics.py"]
)
def test_what_does_not_belong_is_left_out(part):
    assert not [d.name for d in library() if part in f"/{d.name}"]


def test_generated_character_tables_are_left_out():
    names = {document.name for document in library()}
    assert "encodings/utf_8.py" in names and "encodings/cp1252.py" not in names


def test_the_split_depends_on_the_name_alone():
    assert corpora.split_of("dataclasses.py") == Document("dataclasses.py", b"other text").split
    shares = Counter(corpora.split_of(f"module{i}.py") for i in range(20_000))
    for split, share in (("train", 0.9), ("validation", 0.05), ("test", 0.05)):
        assert shares[split] / 20_000 == pytest.approx(share, abs=4 * (share * (1 - share) / 20_000) ** 0.5)
    assert (
        corpora.split_of("x", validation=0, test=1) == "test"
        and corpora.split_of("x", validation=0, test=0) == "train"
    )


def test_digest_sees_names_texts_and_their_border():
    base = [Document("a", b"bc"), Document("d", b"e")]
    others = [
        [Document("ab", b"c"), base[1]],
        [Document("a", b"b"), Document("cd", b"e")],
        base[::-1],
        base[:1],
    ]
    assert len({corpora.digest(documents) for documents in [base, *others]}) == 5
    assert corpora.digest(base) == corpora.digest(list(base))


def test_byte_stream_is_the_bytes_with_a_start_token():
    stream = corpora.byte_stream([Document("a", "é".encode()), Document("b", b"")])
    assert stream.tolist() == [256, 0xC3, 0xA9, 256]
    assert corpora.byte_stream([]).tolist() == []


def test_windows_are_slices_of_the_stream_at_even_spacing():
    documents = [Document("a", bytes(range(100)))]
    every = corpora.byte_windows(documents, 10)
    assert torch.equal(
        every.flatten(), torch.from_numpy(corpora.byte_stream(documents)[:100].astype(np.int64))
    )
    assert torch.equal(corpora.byte_windows(documents, 10, 5), every[::2])
    assert len(corpora.byte_windows(documents, 10, 1000)) == 10


def test_texts_cover_the_library_once():
    parts = {split: corpora.texts(split) for split in ("train", "calibration", "validation", "test")}
    assert Counter(text for part in parts.values() for text in part) == Counter(
        d.text.decode("utf-8", "replace") for d in library()
    )
    assert 0.05 < len(parts["calibration"]) / len(parts["train"]) < 0.2
    names = {d.text.decode("utf-8", "replace"): d.split for d in library()}
    assert {names[text] for text in parts["calibration"]} == {"train"} and {
        names[text] for text in parts["test"]
    } == {"test"}
