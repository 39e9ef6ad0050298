"""Safetensors files of f32 tensors, read and written without the package: 8 bytes of little-endian
header length, a JSON header (dtype, shape, data_offsets by name), then the data. A file appears
whole or not at all: it is written beside its place and renamed."""

import json
import os

import numpy as np
import torch


def save(path, tensors, metadata=None):
    """Writes {name: tensor} as f32, in the order of the names; metadata: {str: str}."""
    header, parts, at = {}, [], 0
    if metadata:
        header["__metadata__"] = metadata
    for name in sorted(tensors):
        t = tensors[name].detach().to("cpu", torch.float32).contiguous()
        data = t.numpy().astype("<f4").tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(t.shape),
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
        if entry["dtype"] != "F32":
            raise ValueError(f"{path}: {name} is {entry['dtype']}, not F32")
        begin, end = entry["data_offsets"]
        flat = np.frombuffer(data, "<f4", (end - begin) // 4, begin).astype(np.float32)
        tensors[name] = torch.from_numpy(flat.reshape(entry["shape"]))
    return tensors, metadata
