"""Methods run beside others' code on the same seeded inputs. By hand, never by `make test`:

    .venv/bin/python -m venv PEERS           # and put the path of the project's own site-packages into
                                             # PEERS/lib/python3.*/site-packages/own.pth
    PEERS/bin/pip install --no-deps -r tests/identity/peers.txt
    PEERS/bin/python -m tests.identity       # all, or the names of methods

Each pair whose peer is there writes a record to `data/evidence/identity/METHOD.json`; the others are
named and left as they are. Peers are installed without what they depend on, so that none changes torch.
A peer "owner/name" is a public repository: a checkout of it, at the commit that its pair names, is the folder
`owner+name` in the folder that the variable IDENTITY_REPOSITORIES names.
Nothing of theirs is copied here: a pair calls their code, or reads numbers that they publish or, of
llama.cpp, that it printed of the pair stored beside them. Pairs that are derived a second time need no peer:
the suite runs them as well.
"""
