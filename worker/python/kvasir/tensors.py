"""Addresses of numpy arrays and torch tensors, on the CPU or a GPU, checked and never copied.

torch is not imported here: a tensor is recognised by what it can do, so that the binding works
with numpy alone. numpy has no bfloat16; there, arrays of uint16 hold its bits.
"""

import ctypes
import sys

import numpy as np

from . import _abi

DTYPES = {"float32": _abi.DTYPE_F32, "float16": _abi.DTYPE_F16, "bfloat16": _abi.DTYPE_BF16}
_NUMPY = {"float32": ("float32",), "float16": ("float16",), "bfloat16": ("bfloat16", "uint16")}


def is_torch(x):
    """Whether x is a torch tensor."""
    return hasattr(x, "data_ptr") and hasattr(x, "device")


def dtype_name(dtype):
    """ "float32", "float16" or "bfloat16" of a name, a numpy dtype or a torch dtype."""
    name = dtype if isinstance(dtype, str) else getattr(dtype, "name", str(dtype))
    name = name.rsplit(".", 1)[-1]
    if name not in DTYPES:
        raise ValueError(f"dtype {name} is not one of {', '.join(DTYPES)}")
    return name


def address(what, x, dtype, shape, writable=False, device="cpu"):
    """
    The address of x; raises TypeError or ValueError naming `what` where x does not fit. writable:
    C will write there, so x must not be read-only (of a buffer or a mapping: a write would crash).
    device: where it must lie, "cpu" or "cuda:N".
    """
    if is_torch(x):
        return _torch_address(what, x, dtype, shape, device)
    if device != "cpu":
        raise TypeError(f"{what} must be a torch tensor on {device}, not {type(x).__name__}")
    if not isinstance(x, np.ndarray):
        raise TypeError(f"{what} must be a numpy array or a torch tensor, not {type(x).__name__}")
    if x.dtype.name not in _NUMPY[dtype]:
        raise TypeError(f"{what} has dtype {x.dtype.name}, the worker's is {dtype}")
    _check_shape(what, x.shape, shape, x.flags.c_contiguous)
    if writable and not x.flags.writeable:
        raise ValueError(f"{what} is read-only")
    return x.ctypes.data


def _torch_address(what, x, dtype, shape, device):
    if str(x.device) != device:
        raise TypeError(f"{what} lies on {x.device}; this worker takes tensors on {device}")
    if str(x.dtype) != f"torch.{dtype}":
        raise TypeError(f"{what} has dtype {x.dtype}, the worker's is {dtype}")
    if x.requires_grad:
        raise TypeError(f"{what} requires a gradient; run under torch.inference_mode()")
    _check_shape(what, tuple(x.shape), shape, x.is_contiguous())
    return x.data_ptr()


def _check_shape(what, have, want, contiguous):
    if tuple(have) != tuple(want):
        raise ValueError(f"{what} has shape {list(have)}, expected {list(want)}")
    if not contiguous:
        raise ValueError(f"{what} is not contiguous")


def current_stream(device):
    """The address of torch's current stream on a GPU; 0: the default one."""
    return sys.modules["torch"].cuda.current_stream(device).cuda_stream


def empty_like(x, shape):
    """A new array of x's kind and dtype."""
    return x.new_empty(shape) if is_torch(x) else np.empty(shape, x.dtype)


def token_ids(tokens):
    """tokens (a list, array or tensor of one dimension) as contiguous uint32."""
    if is_torch(tokens):
        tokens = tokens.detach().cpu().numpy()
    ids = np.asarray(tokens)
    if ids.ndim != 1:
        raise ValueError(f"token ids must have one dimension, not {ids.ndim}")
    if ids.size == 0:
        return np.zeros(0, np.uint32)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"token ids must be integers, not {ids.dtype}")
    if ids.min() < 0 or ids.max() > 0xFFFFFFFF:
        raise ValueError("token ids must fit in 32 bits without a sign")
    return np.ascontiguousarray(ids, dtype=np.uint32)


def u32_pointer(ids):
    """A pointer to uint32 ids; ids must outlive it."""
    return ids.ctypes.data_as(ctypes.POINTER(ctypes.c_uint32))
