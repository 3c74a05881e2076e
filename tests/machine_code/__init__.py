"""Reads the machine code of the CUDA kernels, and says what it holds and what it may hold.

`PYTHONPATH=tests python -m machine_code` prints a table of the kernels of this build.

    disassembly   a library or an object: its kernels' instructions, by nvdisasm
    program       the instructions of a kernel as basic blocks and loops
    paths         the path through a loop that a long row takes again and again, and the way to it
    arithmetic    the shape of a path's floating-point arithmetic
    budgets       what each kernel may cost: one table, and the checks against it
"""
