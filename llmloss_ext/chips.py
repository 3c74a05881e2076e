"""What the cost models know of GPUs: measured where a card was at hand, else estimated.

Numbers are of one card: bytes and operations per second, not marketing peaks.
"""

from __future__ import annotations

from typing import NamedTuple

KIB = 1 << 10


class Chip(NamedTuple):
    """A GPU as the cost models of the dense kernels and of the linear plan see it."""

    name: str
    architecture: str
    """Compute capability, as nvcc writes it."""
    multiprocessors: int
    clock: float
    """Cycles per second under load."""
    copy_bandwidth: float
    """Bytes read plus bytes written per second, by a copy much larger than the L2 cache."""
    products: float
    """Floating-point operations per second of a bfloat16 product of 8192 x 8192 x 8192."""
    shared_per_block: int
    """Bytes, the most that a launch may request."""
    shared_per_multiprocessor: int
    max_cluster: int
    """Blocks; 1: it has no clusters."""
    max_threads: int
    """Of a multiprocessor at once."""
    launch_seconds: float
    """From the end of one kernel to the start of the next of the same stream."""
    is_measured: bool
    """Whether copy_bandwidth and products were measured by this project, on such a card."""

    @property
    def limits(self) -> tuple[int, int, int, int]:
        """The arguments of the operator launch_plan that describe the device."""
        shared = (self.shared_per_block, self.shared_per_multiprocessor)
        return (self.multiprocessors, *shared, self.max_cluster)


H100 = Chip(
    "H100", "90", 132, 1.755e9, 3.05e12, 798e12,
    shared_per_block=227 * KIB, shared_per_multiprocessor=228 * KIB,
    max_cluster=16, max_threads=2048, launch_seconds=2e-6, is_measured=False,
)  # fmt: skip
# The same chip with faster memory.
H200 = H100._replace(name="H200", copy_bandwidth=4.27e12, products=790e12, is_measured=True)
A100 = Chip(
    "A100", "80", 108, 1.41e9, 1.75e12, 280e12,
    shared_per_block=163 * KIB, shared_per_multiprocessor=164 * KIB,
    max_cluster=1, max_threads=2048, launch_seconds=2.5e-6, is_measured=False,
)  # fmt: skip
B200 = Chip(
    "B200", "100", 148, 1.85e9, 7.2e12, 1600e12,
    shared_per_block=227 * KIB, shared_per_multiprocessor=228 * KIB,
    max_cluster=16, max_threads=2048, launch_seconds=2e-6, is_measured=False,
)  # fmt: skip
# From its data sheet: 1.79 TB/s, and 210 TFLOP/s with sums in float32.
RTX_5090 = Chip(
    "RTX 5090", "120", 170, 2.4e9, 1.6e12, 200e12,
    shared_per_block=99 * KIB, shared_per_multiprocessor=100 * KIB,
    max_cluster=8, max_threads=1536, launch_seconds=2e-6, is_measured=False,
)  # fmt: skip
CHIPS = {chip.name: chip for chip in (H100, H200, A100, B200, RTX_5090)}
