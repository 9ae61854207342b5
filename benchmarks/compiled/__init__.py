"""Compile the library's programs for GPUs and TPUs on a machine that has neither, and read the result.

``make test-compilers`` installs the compilers into ``.venv-compilers``. They compile ahead of time for a described
device; nothing runs, so there are no times. The compiled program shows which kernels are launched, what each of them
reads and writes, loops and branches, collectives, and scratch memory.
"""
