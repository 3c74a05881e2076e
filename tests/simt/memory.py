"""Memory whose neighbourhood cannot be touched: one byte too far is a fault, not a lucky read."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_NOTHING, _READ_WRITE = 0, 3


def _protect(address: int, size: int, access: int) -> None:
    if _libc.mprotect(address, size, access) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")


class GuardedMemory:
    """``size`` bytes that end where an unreadable page begins (or begin where one ends)."""

    def __init__(self, size: int, at_start: bool = False) -> None:
        pages = -(-size // PAGE)
        self._map = mmap.mmap(-1, (pages + 2) * PAGE)
        whole = np.frombuffer(self._map, np.uint8)
        base = whole.ctypes.data
        begin = PAGE if at_start else (pages + 1) * PAGE - size
        self.bytes = whole[begin : begin + size]
        self._guards = [(base, PAGE), (base + (pages + 1) * PAGE, PAGE)]
        for address, length in self._guards:
            _protect(address, length, _NOTHING)

    def hide(self, begin: int, end: int) -> None:
        """Makes the whole pages within bytes begin..end unreadable too."""
        base = self.bytes.ctypes.data
        first = -(-(base + begin) // PAGE) * PAGE
        last = (base + end) // PAGE * PAGE
        if first < last:
            self._guards.append((first, last - first))
            _protect(first, last - first, _NOTHING)

    def show(self) -> None:
        """Undoes every ``hide``."""
        for address, length in self._guards[2:]:
            _protect(address, length, _READ_WRITE)
        del self._guards[2:]
