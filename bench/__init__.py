"""The benchmark: measures this library, its peers and the machine's limits in one run.

`cases` describes what is measured, and the bytes and FLOPs that it needs; `suites` groups cases.
`inputs` makes their tensors, and `contenders` the functions that compete on them. `reference`
checks every contender against float64 before `timing` and `memory` measure it. `run` works through
a suite and writes `results`, which `compare`, `report` and `readme` read.
"""
