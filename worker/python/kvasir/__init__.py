"""
Kvasir for Python: long contexts whose keys and values live in a store.

Client, Worker, Sequence and Batch are the C library with arrays in and out and need numpy alone.
attach and detach plug them into a Hugging Face model (torch and transformers are imported on first
use). Tools: python -m kvasir.calibrate, python -m kvasir.quality.
"""

from .batch import Batch
from .client import Client
from .errors import KvasirError, Status
from .worker import Geometry, Rope, Sequence, Worker

__all__ = [
    "Batch",
    "Client",
    "Geometry",
    "KvasirError",
    "Rope",
    "Sequence",
    "Status",
    "Worker",
    "attach",
    "detach",
    "register",
]

_HF = ("attach", "detach", "register")


def __getattr__(name):
    if name in _HF:
        from . import hf

        return getattr(hf, name)
    raise AttributeError(f"module 'kvasir' has no attribute {name!r}")
