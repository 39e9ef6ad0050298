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


# The largest number of each form, and its bits. The library stores int8; the others are for study.
FORMS = {"int8": (127, 8), "e4m3": (448, 8), "int4": (7, 4)}


def quantise(x, form="int8"):
    """x [..., dims] float32 as numbers of a form with one bfloat16 scale per row, and back."""
    scale = round_up_bf16((x.abs().amax(-1, keepdim=True) / FORMS[form][0]).contiguous())
    x = x / torch.where(scale > 0, scale, torch.ones_like(scale))
    return (x.to(torch.float8_e4m3fn).float() if form == "e4m3" else x.round()) * scale


def row_bytes(heads, dims, form="int8"):
    """kvk_index_row_bytes: the values and a bfloat16 scale per head."""
    return heads * (dims * FORMS[form][1] // 8 + 2)


def esa_scores(q, k, a=None, b=None, form="int8"):
    """
    Scores [m, n] of ESA (eq. 3) for each query: exact, or through a, b [1, d_in, dims] with keys
    quantised to a form.
    """
    n_kv_heads = k.shape[1]
    q, k = group_sum(q.float(), n_kv_heads), k.reshape(len(k), -1).float()
    return q @ k.T if a is None else (q @ a[0]) @ quantise(k @ b[0], form).T


def esa_chunk(scores):
    """Eq. 4: scores [m, n] of a chunk's queries -> [n]."""
    return (scores - scores.amax(1, keepdim=True)).amax(0)


def vote_logits(q, k, a=None, b=None, form="int8"):
    """Logits [m, n_q_heads, n] that TokenSelect's softmax takes; a, b [n_kv_heads, d, dims]."""
    m, n_q_heads, d = q.shape
    q, k = q.float().view(m, k.shape[1], -1, d), k.float()
    if a is not None:
        q = torch.einsum("mhgd,hdr->mhgr", q, a)
        k = quantise(torch.einsum("nhd,hdr->nhr", k, b), form)
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
