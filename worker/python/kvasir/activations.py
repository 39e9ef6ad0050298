"""Collects queries and keys of a real model over a text, before RoPE.

The model runs with its own full attention inside windows that it was trained for; every window
starts afresh. Nothing of the store is needed. Samples are kept in the model's dtype.
"""

import threading
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from . import hf_model
from .hf import RawRotary

NAME = "kvasir-capture"
_capture = threading.local()


@dataclass
class Activations:
    """q [n_layers, n_q, n_q_heads, head_dim] and k [n_layers, n_k, n_kv_heads, head_dim]."""

    geometry: object
    q: torch.Tensor
    k: torch.Tensor
    n_tokens: int


def _attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    state = _capture.state
    state.keep(module.layer_idx, query[0].transpose(0, 1), key[0].transpose(0, 1))
    positions = torch.arange(query.shape[2])
    q = hf_model.rotate(query, positions, state.freq)
    k = hf_model.rotate(key, positions, state.freq)
    out = F.scaled_dot_product_attention(
        q, k, value, is_causal=True, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)


class _State:
    """What one collection keeps; every q_stride-th query and k_stride-th key."""

    def __init__(self, geometry, q_stride, k_stride):
        self.freq = hf_model.inv_freq(geometry.rope, geometry.head_dim)
        self.strides = (q_stride, k_stride)
        self.q = [[] for _ in range(geometry.n_layers)]
        self.k = [[] for _ in range(geometry.n_layers)]

    def keep(self, layer, q, k):
        self.q[layer].append(q[:: self.strides[0]].clone())
        self.k[layer].append(k[:: self.strides[1]].clone())


def collect(model, ids, window=4096, q_stride=16, k_stride=4, progress=None):
    """
    Activations of a model over token ids (a list or 1-D tensor), in windows of `window` tokens.
    progress(n_done, n_total). The model must not be attached.
    """
    geometry, base = hf_model.geometry_of(model)
    ids = torch.as_tensor(ids).view(1, -1).to(hf_model.device_of(base))
    state = _State(geometry, q_stride, k_stride)
    implementation, rotary = model.config._attn_implementation, base.rotary_emb
    base.rotary_emb = RawRotary(rotary)
    model.set_attn_implementation(NAME)
    _capture.state = state
    try:
        with torch.inference_mode():
            for i in range(0, ids.shape[1], window):
                base(input_ids=ids[:, i : i + window], use_cache=False)
                if progress is not None:
                    progress(min(i + window, ids.shape[1]), ids.shape[1])
    finally:
        _capture.state = None
        base.rotary_emb = rotary
        model.set_attn_implementation(implementation)
    return Activations(
        geometry,
        torch.stack([torch.cat(x) for x in state.q]).cpu(),
        torch.stack([torch.cat(x) for x in state.k]).cpu(),
        ids.shape[1],
    )
