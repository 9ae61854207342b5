"""What the compilers for GPUs and TPUs make of the library's programs, on a machine that has neither.

``make test-compilers`` installs the compilers into ``.venv-compilers``. They compile ahead of time for a device that
is described to them; nothing runs, so there are no times. The compiled program says which kernels are launched, what
each reads and writes, what is in a loop or a branch, which collectives there are, and how much scratch memory it takes.
"""
