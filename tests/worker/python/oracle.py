"""ESA and TokenSelect in plain numpy, float64, written from the papers and not from the worker.

Settings come in an Oracle; attend() is one layer's step: raw q, k, v of the whole context, the last
n_new tokens being the queries. Sources: arXiv 2502.14477 (eq. 3, 4, 8 and section 3.2), arXiv
2411.02886 (eq. 7; positions as FlashInfer renumbers them).
"""

from dataclasses import dataclass

import numpy as np


def rope(x, positions, theta):
    """x [n, heads, d] rotated by positions [n]; pairs (i, i + d/2)."""
    d = x.shape[-1]
    freq = theta ** (-np.arange(0, d, 2) / d)
    angle = np.asarray(positions, float)[:, None, None] * freq
    a, b = x[..., : d // 2], x[..., d // 2 :]
    c, s = np.cos(angle), np.sin(angle)
    return np.concatenate((a * c - b * s, b * c + a * s), -1)


def logits(q, k, scale):
    """[m, n_q_heads, n]: query head h meets kv head h // group."""
    group = q.shape[1] // k.shape[1]
    return np.stack([q[:, h] @ k[:, h // group].T * scale for h in range(q.shape[1])], 1)


def soft(x):
    """Softmax of the last axis; -inf is masked."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def mix(weights, v):
    """weights [m, n_q_heads, n] over v [n, n_kv_heads, d] -> [m, n_q_heads, d]."""
    group = weights.shape[1] // v.shape[1]
    return np.stack([weights[:, h] @ v[:, h // group] for h in range(weights.shape[1])], 1)


@dataclass
class Oracle:
    """One selector's settings."""

    selector: str
    n_sink: int
    n_recent: int
    k: int
    theta: float
    eps: int = 0
    last_scores: np.ndarray = None  # of the last selection, by candidate
    last_picks: np.ndarray = None

    def near_begin(self, n, n_new):
        """The first recent token."""
        near = (
            max(self.n_recent, n_new) if self.selector == "tokenselect" else self.n_recent + n_new
        )
        return max(0, n - near)

    def attend(self, q, k, v):
        """q [n_new, n_q_heads, d], k, v [n, n_kv_heads, d] raw -> [n_new, n_q_heads, d]."""
        q, k, v = (np.asarray(x, float) for x in (q, k, v))
        n, n_new, scale = len(k), len(q), q.shape[-1] ** -0.5
        begin = self.near_begin(n, n_new)
        if begin - self.n_sink <= self.k:
            self.last_picks = None
            return self._causal(q, k, v, np.arange(n), scale)
        picks = self.select(q, k[self.n_sink : begin])
        if self.selector == "tokenselect":
            rows = np.concatenate((np.arange(self.n_sink), picks, np.arange(begin, n)))
            return self._causal(q, k[rows], v[rows], np.arange(len(rows)), scale)
        far = np.concatenate((np.arange(self.n_sink), picks))
        return self._far_near(q, k, v, far, begin, scale)

    def _causal(self, q, k, v, positions, scale):
        n, n_new = len(k), len(q)
        x = logits(
            rope(q, positions[n - n_new :], self.theta), rope(k, positions, self.theta), scale
        )
        hidden = np.arange(n)[None] > np.arange(n - n_new, n)[:, None]
        x = np.where(hidden[:, None], -np.inf, x)
        return mix(soft(x), v)

    def _far_near(self, q, k, v, far, begin, scale):
        n_near, n_new = len(k) - begin, len(q)
        at_w = rope(q, np.full(n_new, self.n_recent), self.theta)
        x_far = logits(at_w, k[far], scale)
        where = np.arange(n_near)
        x_near = logits(
            rope(q, where[n_near - n_new :], self.theta), rope(k[begin:], where, self.theta), scale
        )
        hidden = where[None] > where[n_near - n_new :, None]
        x_near = np.where(hidden[:, None], -np.inf, x_near)
        weights = soft(np.concatenate((x_far, x_near), -1))
        return mix(weights, np.concatenate((v[far], v[begin:])))

    def scores(self, q, k):
        """One score per candidate."""
        if self.selector == "tokenselect":
            mean = rope(q, self.n_recent + np.arange(len(q)), self.theta).mean(0, keepdims=True)
            return soft(logits(mean, k, 1.0)).sum((0, 1))
        x = logits(rope(q, np.full(len(q), self.n_recent), self.theta), k, 1.0).sum(1)
        return (x - x.max(1, keepdims=True)).max(0)

    def select(self, q, k):
        """Positions picked among candidates k, ascending."""
        s = self.scores(q, k)
        if self.eps:
            n = len(s)
            s = np.array([s[max(0, j - self.eps) : j + self.eps + 1].max() for j in range(n)])
        order = np.lexsort((np.arange(len(s)), -s))
        self.last_scores = s
        self.last_picks = np.sort(order[: self.k]) + self.n_sink
        return self.last_picks

    def agrees(self, picks, tolerance):
        """Whether picks differ from the last selection only where scores are within tolerance."""
        wrong = np.setxor1d(picks, self.last_picks) - self.n_sink
        kth = self.last_scores[self.last_picks - self.n_sink].min()
        return len(picks) == len(self.last_picks) and np.all(
            np.abs(self.last_scores[wrong] - kth) <= tolerance
        )
