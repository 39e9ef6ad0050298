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
