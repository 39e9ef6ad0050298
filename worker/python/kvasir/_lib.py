"""Finds and loads libkvw.so, once per process.

Places, in this order: $KVASIR_LIB (a file or a folder), the folder of the installed package, the
linker's own search path, and the newest build folder of a source tree. Every call releases the
interpreter lock while it runs. The library's last error is per thread, so it is read in the thread
that made the call.
"""

import ctypes
import os
import threading
import time
from pathlib import Path

from . import _abi
from .errors import KvasirError

NAME = "libkvw.so"
_lock = threading.Lock()
_lib = None


def _from_env():
    value = os.environ.get("KVASIR_LIB")
    if not value:
        return []
    path = Path(value)
    return [path / NAME if path.is_dir() else path]


def _from_build():
    """Build folders beside the package, the one that was built last first."""
    root = Path(__file__).resolve().parents[3]
    found = [p for d in ("build*", "build/*") for p in root.glob(f"{d}/worker/{NAME}")]
    return sorted(found, key=lambda p: p.stat().st_mtime, reverse=True)


def candidates():
    """What load() tries, in order. A set KVASIR_LIB is the only one."""
    env = _from_env()
    if env:
        return env
    here = Path(__file__).resolve().parent
    return [p for p in (here / NAME,) if p.exists()] + [Path(NAME)] + _from_build()


def _open():
    tried = []
    for path in candidates():
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            tried.append(f"  {path}: {error}")
    raise ImportError(
        f"{NAME} was not found. Build it in the source tree (cmake --preset demo && cmake --build "
        "--preset demo --target kvw) and install the package from there (pip install -e "
        "worker/python), or set KVASIR_LIB to the file or its folder. Tried:\n" + "\n".join(tried)
    )


def load():
    """The library with its calls declared; raises ImportError saying where it was looked for."""
    global _lib
    with _lock:
        if _lib is None:
            lib = _open()
            for name, (result, args) in _abi.CALLS.items():
                call = getattr(lib, name)
                call.restype, call.argtypes = result, args
            _lib = lib
    return _lib


def check(code, call, last_error="kvw_last_error"):
    """Raises KvasirError unless code is OK."""
    if code != 0:
        text = getattr(load(), last_error)() or b""
        raise KvasirError(code, call, text.decode("utf-8", "replace"))


def ns(seconds):
    """Seconds to nanoseconds; None is 0, the C side's default."""
    return 0 if seconds is None else max(1, round(seconds * 1e9))


def deadline_ns(timeout_s):
    """An absolute CLOCK_MONOTONIC deadline; None is 0, the C side's default."""
    return 0 if timeout_s is None else time.monotonic_ns() + ns(timeout_s)
