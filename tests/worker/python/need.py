"""Skips a test program, out loud and with ctest's code for it, where Python lacks a module."""

import importlib.util
import sys

SKIPPED = 77


def modules(*names):
    """Exits with SKIPPED unless every module can be found."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        print(f"SKIPPED: {sys.executable} has no {', '.join(missing)}")
        sys.exit(SKIPPED)


def cuda():
    """Exits with SKIPPED unless torch and the library both have a GPU."""
    import torch

    import kvasir

    if not torch.cuda.is_available():
        print(f"SKIPPED: torch of {sys.executable} has no GPU")
        sys.exit(SKIPPED)
    geometry = kvasir.Geometry(1, 1, 1, 64, "bfloat16", kvasir.Rope(10000.0))
    try:
        kvasir.Worker(geometry, "m", "tokenselect", backend="cuda", index="exact")
    except kvasir.KvasirError as error:
        if "no CUDA" in str(error):
            print(f"SKIPPED: {error}")
            sys.exit(SKIPPED)
