"""Which stable ABI of torch the operators are compiled for."""


def stable_abi(installed: str) -> tuple[int, int]:
    """The oldest torch that loads them: 2.13 if the version installed has its ABI, else 2.11.

    Args:
        installed: `torch.__version__`.
    """
    return (2, 13) if tuple(map(int, installed.split(".")[:2])) >= (2, 13) else (2, 11)
