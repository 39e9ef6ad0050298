"""The rank-d' compressor of a selector's index, in closed form (float64, numpy-like torch).

For independent q and k, the A and B of rank d' that minimise E (q'k - q'A B'k)^2 are
A = Sq^-1/2 U s^1/2, B = Sk^-1/2 V s^1/2 with U s V' = SVD(Sq^1/2 Sk^1/2). Two things are free and
help: a constant added to all scores of one query changes neither top-k nor softmax, so Sk is
centred; and only the ranking near the top counts, so keys are weighted by how often they are among
the best `top` of sampled queries, and (where `normalise`) queries by the spread of their scores.
"""

import torch


def covariance(k, weights=None):
    """Centred second moment of k [n, d] under weights [n] that sum to 1."""
    if weights is None:
        weights = torch.full((len(k),), 1.0 / len(k), dtype=k.dtype)
    mean = weights @ k
    return (k * weights[:, None]).T @ k - torch.outer(mean, mean)


def top_weights(q, k, top, n_queries=512, seed=0):
    """How often each key is among the best share `top` of the keys, over sampled queries."""
    chosen = torch.randperm(len(q), generator=torch.Generator().manual_seed(seed))[:n_queries]
    centred = (k - k.mean(0)).float()
    hits = torch.zeros(len(k), dtype=torch.float64)
    n_top = max(1, int(len(k) * top))
    for part in chosen.split(64):
        scores = q[part].float() @ centred.T
        hits += (scores >= scores.topk(n_top, 1).values[:, -1:]).double().sum(0)
    return hits / hits.sum()


def roots(s, ridge):
    """(S^1/2, S^-1/2) with eigenvalues raised to at least ridge times their mean."""
    w, v = torch.linalg.eigh(s)
    w = w.clamp_min(max(ridge * float(w.mean()), 1e-300))
    return (v * w.sqrt()) @ v.T, (v * w.rsqrt()) @ v.T


def solve(q, k, dims, top=1 / 32, normalise=True, ridge=1e-4):
    """
    A, B [d, dims] float64 from samples q [n, d] and k [m, d], best columns first. top None: plain
    least squares. dims may not exceed d.
    """
    q, k = q.double(), k.double()
    sk = covariance(k)
    if normalise:
        spread = torch.einsum("qi,ij,qj->q", q, sk, q).clamp_min(1e-30).sqrt()
        q = q / spread[:, None]
    if top is not None:
        sk = covariance(k, top_weights(q, k, top))
    sq_root, sq_inverse = roots(q.T @ q / len(q), ridge)
    sk_root, sk_inverse = roots(sk, ridge)
    u, s, vt = torch.linalg.svd(sq_root @ sk_root)
    half = s[:dims].sqrt()
    return sq_inverse @ u[:, :dims] * half, sk_inverse @ vt.T[:, :dims] * half


def group_sum(q, n_kv_heads):
    """q [n, n_q_heads, d] -> [n, n_kv_heads * d]: query heads of a group summed (ESA eq. 3)."""
    n, heads, d = q.shape
    return q.view(n, n_kv_heads, heads // n_kv_heads, d).sum(2).reshape(n, n_kv_heads * d)


def solve_layer(q, k, form, dims, **kwargs):
    """A, B [heads, d_in, dims] of a layer: q [n, n_q_heads, d] as scored, k [m, n_kv_heads, d]."""
    n_kv_heads, d = k.shape[1:]
    if form == "shared":
        a, b = solve(group_sum(q.double(), n_kv_heads), k.reshape(len(k), -1), dims, **kwargs)
        return a[None], b[None]
    per_head = q.view(len(q), n_kv_heads, -1, d).transpose(0, 1).reshape(n_kv_heads, -1, d)
    pairs = [
        solve(per_head[h], k[:, h], dims, normalise=False, **kwargs) for h in range(n_kv_heads)
    ]
    return torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])
