"""Methods run beside others' code on the same seeded inputs. By hand, never by `make test`:

    python -m venv --system-site-packages /somewhere/peers      # from the project's own environment
    /somewhere/peers/bin/pip install --no-deps -r tests/identity/peers.txt
    /somewhere/peers/bin/python -m tests.identity               # all, or the names of methods

Peers that are no packages are read from checkouts: `IDENTITY_REPOSITORIES` names a folder that holds
`owner+name` for each, at the commit of `repositories.py`.

Each pair whose peer is there writes a record to `data/evidence/identity/METHOD.json`; the others are
named and left as they are. Peers are installed without what they depend on, so that none changes torch.
A peer "owner/name" is a public repository: a checkout of it, at the commit that its pair names, is the folder
`owner+name` in the folder that the variable IDENTITY_REPOSITORIES names.
Nothing of theirs is copied here: a pair calls their code, or reads numbers that they publish or, of
llama.cpp, that it printed of the pair stored beside them. Pairs that are derived a second time need no peer:
the suite runs them as well.
"""
