from __future__ import annotations

import workbench
from workbench.pruning.recovery.trainable import embedding_parameters, set_trainable


def test_a_body_has_no_embeddings_and_everything_has(checkpoints):
    subject = workbench.subject(checkpoints["llama"], data="random")
    embeddings = embedding_parameters(subject.model)
    every, body = set_trainable(subject, "all"), set_trainable(subject, "body")
    assert embeddings and {id(p) for p in every} - {id(p) for p in body} == embeddings
    assert all(p.requires_grad == (id(p) not in embeddings) for p in subject.model.parameters())
    assert not embeddings & {id(p) for kind in ("adapters", "head") for p in set_trainable(subject, kind)}
