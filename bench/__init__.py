"""The benchmark: this library, its peers and the machine's limits side by side in one run.

`cases` says what is measured and how many bytes and FLOPs it needs, `suites` which cases belong
together; `inputs` makes their tensors and `contenders` the functions that compete on them;
`reference` holds every contender to float64 before `timing` and `memory` measure it; `run` goes
through a suite; `results` is what a run leaves; `compare`, `report` and `readme` read it.
"""
