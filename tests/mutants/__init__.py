"""Makes mutants of the sources, and tells which of them no test notices: `make mutants`.

A mutant is a copy of the repository in which one operator, condition or constant is another. A
mutant that survives its tests shows a line that they do not hold: either a test is missing, or the
two lines mean the same, which `equivalent.txt` then says with the reason.
"""
