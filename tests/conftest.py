"""What every test needs."""

import os

# `make test` hands its own flags on to every make that a test calls, which would then print more than it was asked for.
for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):
    os.environ.pop(name, None)
# Beside other test processes, each has one core: set before torch is imported, and handed on to what a test starts.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
