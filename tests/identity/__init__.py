"""Methods run beside others' code on the same seeded inputs. By hand, never by `make test`:

    python -m venv --system-site-packages /somewhere/peers      # from the project's own environment
    /somewhere/peers/bin/pip install --no-deps -r tests/identity/peers.txt
    IDENTITY_REPOSITORIES=/somewhere/code \
        /somewhere/peers/bin/python -m tests.identity           # all, or the names of methods

`IDENTITY_REPOSITORIES` names a folder of checkouts, `owner+name` for each of `repositories.COMMITS`, for the
peers that are no packages.

Each pair whose peer is installed writes a record to `data/evidence/identity/METHOD.json`; the others are
named and left as they are. Peers are installed without what they depend on, so that none changes torch.
Nothing of theirs is copied here: a pair calls their code, or reads numbers that they publish. Pairs that are
derived a second time need no peer; the suite runs them as well.
"""
