"""A fault campaign: real runs of a tiny model, to which faults happen at random points until each has its model. Knows the records.

`python -m tests.faults --faults 200` (`make test-faults`) runs it and prints what it cost; `tests/slow/test_faults.py` is its
short form. `world` holds what is shared (store, gate, disk), `run` one job and its processes, `faults` what can happen,
`audit` what must hold in spite of it, `campaign` the order of things and the tally.
"""
