"""The index of a selector, modelled in torch: what kvk_quantize stores and what a scan scores.

For offline analysis and as an oracle in tests; serving uses the C library. Shapes: keys
[n, n_kv_heads, d] raw, queries [m, n_q_heads, d] as scored (rotated or raw).
"""

import torch

from .closed_form import group_sum


def round_up_bf16(x):
    """x (positive float32) rounded up to bfloat16, as float32."""
    bits = x.view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)


def quantise(x):
    """x [..., dims] float32 as int8 with one bfloat16 scale per row, and back."""
    scale = round_up_bf16((x.abs().amax(-1, keepdim=True) / 127).contiguous())
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (x / safe).round() * scale


def row_bytes(heads, dims):
    """kvk_index_row_bytes: int8 values and a bfloat16 scale per head."""
    return heads * (dims + 2)


def esa_scores(q, k, a=None, b=None):
    """
    Scores [m, n] of ESA (eq. 3) for each query: exact, or through a, b [1, d_in, dims] with
    quantised keys.
    """
    n_kv_heads = k.shape[1]
    q, k = group_sum(q.float(), n_kv_heads), k.reshape(len(k), -1).float()
    return q @ k.T if a is None else (q @ a[0]) @ quantise(k @ b[0]).T


def esa_chunk(scores):
    """Eq. 4: scores [m, n] of a chunk's queries -> [n]."""
    return (scores - scores.amax(1, keepdim=True)).amax(0)


def vote_logits(q, k, a=None, b=None):
    """Logits [m, n_q_heads, n] that TokenSelect's softmax takes; a, b [n_kv_heads, d, dims]."""
    m, n_q_heads, d = q.shape
    q, k = q.float().view(m, k.shape[1], -1, d), k.float()
    if a is not None:
        q = torch.einsum("mhgd,hdr->mhgr", q, a)
        k = quantise(torch.einsum("nhd,hdr->nhr", k, b))
    return torch.einsum("mhgd,nhd->mhgn", q, k).flatten(1, 2)


def soft_vote(logits):
    """Eq. 7: logits [m, n_q_heads, n] -> votes [m, n]."""
    return logits.softmax(-1).sum(1)


def rerank(votes, fine_logits, k, factor=4):
    """Positions [m, k]: the best factor * k by votes, of these the best by fine_logits' votes."""
    candidates = votes.topk(min(factor * k, votes.shape[1]), 1).indices
    index = candidates[:, None].expand(-1, fine_logits.shape[1], -1)
    fine = soft_vote(fine_logits.gather(2, index))
    return candidates.gather(1, fine.topk(min(k, fine.shape[1]), 1).indices)
