"""
python -m kvasir.gca.weights IN OUT: the weights of a checkpoint in half the bytes (bf16).

Safetensors files of f32 or bf16 tensors, read and written without the package: 8 bytes of
little-endian header length, a JSON header (dtype, shape, data_offsets by name), then the data. A
file appears whole or not at all: it is written beside its place and renamed.
"""

import json
import os
import sys

import numpy as np
import torch


def to_bytes(tensor, dtype):
    """The numbers of a tensor, little-endian; to bf16 they are rounded to nearest even."""
    t = tensor.detach().to("cpu", torch.float32).contiguous()
    if dtype == "BF16":
        return t.to(torch.bfloat16).view(torch.int16).numpy().astype("<i2").tobytes()
    return t.numpy().astype("<f4").tobytes()


def save(path, tensors, metadata=None, dtype="F32"):
    """Writes {name: tensor} as F32 or BF16, in the order of the names; metadata: {str: str}."""
    header, parts, at = {}, [], 0
    if metadata:
        header["__metadata__"] = metadata
    for name in sorted(tensors):
        data = to_bytes(tensors[name], dtype)
        header[name] = {
            "dtype": dtype,
            "shape": list(tensors[name].shape),
            "data_offsets": [at, at + len(data)],
        }
        parts.append(data)
        at += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    beside = f"{path}.new"
    with open(beside, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for data in parts:
            f.write(data)
    os.replace(beside, path)


def load(path):
    """({name: f32 tensor}, metadata) of a file that save wrote."""
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
        data = f.read()
    metadata, tensors = header.pop("__metadata__", {}), {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if entry["dtype"] == "F32":
            flat = np.frombuffer(data, "<f4", (end - begin) // 4, begin).astype(np.float32)
        elif entry["dtype"] == "BF16":
            high = np.frombuffer(data, "<u2", (end - begin) // 2, begin).astype(np.uint32)
            flat = (high << 16).view(np.float32)
        else:
            raise ValueError(f"{path}: {name} is {entry['dtype']}, neither F32 nor BF16")
        tensors[name] = torch.from_numpy(flat.reshape(entry["shape"]))
    return tensors, metadata


def halve(source, target):
    """Writes the weights of source as bf16, with its config and state."""
    tensors, metadata = load(source)
    save(target, tensors, metadata, "BF16")


if __name__ == "__main__":
    halve(*sys.argv[1:])
