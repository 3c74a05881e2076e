"""Which stable ABI of torch the operators are compiled for."""

STABLE_ABI = (2, 11)
"""The oldest torch that loads them; newer ones do, too."""

TORCH_TARGET = f"-DTORCH_TARGET_VERSION=0x{STABLE_ABI[0]:02x}{STABLE_ABI[1]:02x}000000000000"
"""What says so to torch's headers."""
