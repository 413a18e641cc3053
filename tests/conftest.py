"""What every test needs."""

import os

# `make test` hands its own flags on to every make that a test calls, which would then print more than it was asked for.
for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):
    os.environ.pop(name, None)
