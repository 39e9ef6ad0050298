"""Reads and writes the calibration artefact of a compressed index (format: worker/README.md)."""

import os
from dataclasses import dataclass, field

import numpy as np

MAGIC = b"kvasir-projection-v1\n"
MAX_HEADER_BYTES = 4096


@dataclass
class Projection:
    """
    a, b: float32 [n_layers, heads, d_in, dims]; form "shared" (heads 1, d_in n_kv_heads*head_dim)
    or "per_head" (heads n_kv_heads, d_in head_dim). rope: the position at which queries were
    rotated, or "raw". Columns are sorted by weight, so the first ones are a smaller projection.
    """

    selector: str
    model: str
    n_kv_heads: int
    head_dim: int
    form: str
    rope: object
    a: np.ndarray
    b: np.ndarray
    notes: dict = field(default_factory=dict)

    @property
    def dims(self):
        """Columns."""
        return self.a.shape[-1]

    def header(self):
        """The text before the matrices, empty line included."""
        pairs = {
            "selector": self.selector,
            "model": self.model,
            "n_layers": self.a.shape[0],
            "n_kv_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "dims": self.dims,
            "form": self.form,
            "rope": self.rope,
            "nested": 1,
            **self.notes,
        }
        for key, value in pairs.items():
            if "\n" in str(value) or not str(value):
                raise ValueError(f"the value of {key} is empty or has a line break")
        text = MAGIC + "".join(f"{k}={v}\n" for k, v in pairs.items()).encode() + b"\n"
        if len(text) > MAX_HEADER_BYTES:
            raise ValueError(f"the header has {len(text)} bytes, at most {MAX_HEADER_BYTES} fit")
        return text

    def write(self, path):
        """Writes the artefact to path, whole or not at all."""
        if self.form not in ("shared", "per_head"):
            raise ValueError(f"form {self.form!r}")
        shared = self.form == "shared"
        heads = 1 if shared else self.n_kv_heads
        d_in = self.n_kv_heads * self.head_dim if shared else self.head_dim
        for m in (self.a, self.b):
            if m.shape != (self.a.shape[0], heads, d_in, self.dims) or not np.isfinite(m).all():
                raise ValueError(f"a matrix has shape {m.shape} or an element that is not finite")
        both = np.stack((self.a, self.b), axis=1).astype("<f4")
        tmp = f"{path}.tmp"
        with open(tmp, "wb") as out:
            out.write(self.header())
            out.write(both.tobytes())
            out.flush()
            os.fsync(out.fileno())
        os.replace(tmp, path)


def read(path):
    """The Projection in a file; ValueError says what is wrong with it."""
    with open(path, "rb") as f:
        data = f.read()
    end = data.find(b"\n\n", 0, MAX_HEADER_BYTES)
    if not data.startswith(MAGIC) or end < 0:
        raise ValueError(f"{path} does not begin like a projection")
    pairs = dict(line.split("=", 1) for line in data[len(MAGIC) : end].decode().split("\n"))
    n_layers, n_kv_heads = int(pairs.pop("n_layers")), int(pairs.pop("n_kv_heads"))
    head_dim, dims, form = int(pairs.pop("head_dim")), int(pairs.pop("dims")), pairs.pop("form")
    heads, d_in = (1, n_kv_heads * head_dim) if form == "shared" else (n_kv_heads, head_dim)
    body = np.frombuffer(data[end + 2 :], "<f4")
    if body.size != 2 * n_layers * heads * d_in * dims:
        raise ValueError(f"{path} does not have the length that its header says")
    both = body.reshape(n_layers, 2, heads, d_in, dims)
    rope = pairs.pop("rope")
    pairs.pop("nested", None)
    return Projection(
        pairs.pop("selector"),
        pairs.pop("model"),
        n_kv_heads,
        head_dim,
        form,
        rope if rope == "raw" else int(rope),
        both[:, 0],
        both[:, 1],
        pairs,
    )
