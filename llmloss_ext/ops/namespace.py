"""Where torch finds the operators: the one place in Python that knows.

csrc/ops/library.cpp is the one in C++. Both have another name in a kernel repository
(tools/kernel_repo.py), so that its operators and those of an installed package are two.
"""

NAMESPACE = "llmloss"


def qualified(operator: str) -> str:
    """The full name of an operator, by which `torch.library` knows it."""
    return f"{NAMESPACE}::{operator}"
