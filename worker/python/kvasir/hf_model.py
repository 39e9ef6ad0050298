"""What a Hugging Face model is, as far as Kvasir must know: geometry, rope, and what to refuse.

Nothing is guessed from names alone: the rotary module's own cosines and the modelling file's own
rotation are compared with what the worker will do, so an unknown variant is refused, not served
wrongly.
"""

import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .worker import Geometry, Rope

PIECE_BYTES = 16 << 20  # hashed at a time; enters the fingerprint
_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class UnsupportedModel(ValueError):
    """The model has something that the worker cannot do."""


def base_of(model):
    """The decoder inside a model: the module that has .layers and .rotary_emb."""
    for m in (model, getattr(model, "model", None), getattr(model, "language_model", None)):
        if m is not None and hasattr(m, "layers") and hasattr(m, "rotary_emb"):
            return m
    raise UnsupportedModel(
        f"{type(model).__name__}: no decoder with .layers and .rotary_emb: not a Llama-like model"
    )


def _rope_parameters(config):
    rope = getattr(config, "rope_parameters", None) or {}
    if not rope and getattr(config, "rope_theta", None):
        rope = {"rope_theta": config.rope_theta, **(getattr(config, "rope_scaling", None) or {})}
    if not rope or any(isinstance(v, dict) for v in rope.values()):
        raise UnsupportedModel("rotary parameters differ between layers, or there are none")
    return rope


def rope_of(config):
    """Rope from a config; rope types default (plain) and llama3."""
    p = _rope_parameters(config)
    kind = p.get("rope_type", p.get("type", "default"))
    if p.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None)) not in (
        None,
        1,
        1.0,
    ):
        raise UnsupportedModel("only part of each head is rotated (partial_rotary_factor)")
    if kind == "default":
        return Rope(float(p["rope_theta"]))
    if kind == "llama3":
        return Rope(
            float(p["rope_theta"]),
            float(p["factor"]),
            float(p["low_freq_factor"]),
            float(p["high_freq_factor"]),
            int(p["original_max_position_embeddings"]),
        )
    raise UnsupportedModel(f"rope type {kind!r}; default and llama3 can be done")


def inv_freq(rope, head_dim):
    """Rotary frequencies [head_dim/2] in float64, the worker's formula."""
    freq = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if not rope.is_llama3:
        return freq
    wavelength = 2 * torch.pi / freq
    ratio = rope.original_max_position / wavelength
    smooth = (ratio - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return freq * ((1 - smooth) / rope.factor + smooth)


def rotate(x, positions, freq):
    """x [..., T, head_dim] rotated by positions [T] (or one number), pairs (i, i + d/2)."""
    angle = torch.as_tensor(positions, dtype=torch.float64).to(x.device)[..., None]
    angle = angle * freq.to(x.device)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _check_config(config):
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise UnsupportedModel(f"layers of kind {', '.join(sorted(kinds - {'full_attention'}))}")
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise UnsupportedModel(f"sliding-window attention (window {config.sliding_window})")
    for name in ("attn_logit_softcapping", "attention_chunk_size"):
        if getattr(config, name, None):
            raise UnsupportedModel(f"{name} in the config")


def check_rotation(base, rope, head_dim):
    """
    Compares the model's own rotary embedding and rotation with the worker's. A model cast as a
    whole (model.bfloat16()) has rounded its frequencies, so there only small angles tell.
    """
    rounded = base.rotary_emb.inv_freq.dtype != torch.float32
    positions = torch.tensor([[0, 1, 2, 7] if rounded else [0, 1, 7, 1000]])
    tolerance = 5e-2 if rounded else 2e-3
    device = base.rotary_emb.inv_freq.device
    x = torch.zeros(1, 4, head_dim, device=device)
    cos, sin = (y.cpu() for y in base.rotary_emb(x, positions.to(device)))
    angle = positions[0, :, None].double() * inv_freq(rope, head_dim)
    want = torch.cat((angle, angle), -1)
    if (
        cos.shape[-1] != head_dim
        or not torch.allclose(cos[0].double(), want.cos(), atol=tolerance)
        or not torch.allclose(sin[0].double(), want.sin(), atol=tolerance)
    ):
        raise UnsupportedModel("its rotary embedding is not plain or Llama-3 RoPE over whole heads")
    apply = getattr(sys.modules[type(base).__module__], "apply_rotary_pos_emb", None)
    if apply is None:
        return
    q = torch.arange(4.0 * head_dim).view(1, 1, 4, head_dim) / head_dim
    have = apply(q, q, cos.float(), sin.float())[0][0, 0]
    if not torch.allclose(
        have.double(),
        rotate(q[0, 0].double(), positions[0], inv_freq(rope, head_dim)),
        atol=10 * tolerance,
    ):
        raise UnsupportedModel("it rotates other pairs of dimensions than (i, i + head_dim/2)")


def geometry_of(model):
    """(Geometry, base module) of a model; UnsupportedModel says what stands in the way."""
    base, config = base_of(model), model.config.get_text_config(decoder=True)
    _check_config(config)
    weight = next(base.layers.parameters())
    if len({str(x.device) for x in base.parameters()}) != 1:
        raise UnsupportedModel("its weights lie on several devices")
    if weight.dtype not in _DTYPES:
        raise UnsupportedModel(f"dtype {weight.dtype}")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = rope_of(config)
    check_rotation(base, rope, head_dim)
    attention = base.layers[0].self_attn
    return (
        Geometry(
            n_layers=config.num_hidden_layers,
            n_q_heads=config.num_attention_heads,
            n_kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            dtype=_DTYPES[weight.dtype],
            rope=rope,
            attention_scale=float(getattr(attention, "scaling", head_dim**-0.5)),
        ),
        base,
    )


def device_of(base):
    """Where a decoder's weights lie: "cpu" or "cuda:N"."""
    return str(next(base.layers.parameters()).device)


def on_device(device, options):
    """Worker's options for a model on device: on a GPU its tensors go to C as they are."""
    if device == "cpu":
        return options
    backend = options.get("backend") or "cpu"
    if backend != device and f"{backend}:0" != device:
        raise UnsupportedModel(f'the model lies on {device}: give backend="{device}", or move it')
    return {**options, "device_memory": 1}


def model_id(model):
    """The name in the schema and in projections: the hub id, or the folder's own name."""
    name = model.config._name_or_path
    if not name:
        return type(model).__name__
    return Path(name).resolve().name if Path(name).is_dir() else name


def _weights(model):
    """(name, tensor) of what the model computes with and would be saved; shared ones once."""
    seen = set()
    for name, x in model.state_dict(keep_vars=True).items():
        if not isinstance(x, torch.Tensor) or id(x) in seen:
            continue
        seen.add(id(x))
        yield name, x


def _pieces(model):
    """Each weight's description, then its bytes as arrays of at most PIECE_BYTES."""
    for name, x in _weights(model):
        yield f"{name} {tuple(x.shape)} {x.dtype}".encode()
        flat = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        for i in range(0, flat.numel(), PIECE_BYTES):
            yield flat[i : i + PIECE_BYTES].numpy()


def fingerprint(model):
    """
    Hexadecimal digest of the config and of every byte of every weight. It is the schema's revision
    unless one is given: two fine-tunings of one model must not share keys and values. SHA-256 on
    all cores, 1.3 GB/s a core with SHA instructions: 270 MB take 0.1 to 0.3 s on two, 16 GB 6 s.
    """
    h = hashlib.sha256(repr(sorted(model.config.to_diff_dict().items())).encode())
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for digest in pool.map(lambda piece: hashlib.sha256(piece).digest(), _pieces(model)):
            h.update(digest)
    return h.hexdigest()[:32]
