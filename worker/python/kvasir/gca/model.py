"""
The decoder: after GCA (2410.01651 sec 3), small.

Rows come in chunks of 64, the last row of each being the landmark token. The lower half (sliding
window attention with ALiBi) runs over everything. An encoder of two layers, bidirectional inside a
chunk, turns its output into what the store keeps: a landmark (the encoder's row of the landmark
token) and one pair of K and V, shared by every upper layer. A row's V is of the token behind it, so
that what looks like the current token tells the next one. The landmark's row is zero: it adds
exp(0) to each chunk's softmax (softmax off by one). The upper half runs over the last chunks only,
the tail; its layers form groups. A group retrieves once a chunk: the landmark row of chunk t, RMS
normed, scores the landmarks of chunks i < t, and chunk t + 1 uses the best k, weighted by a softmax
over those k scores. Queries meet memory without any position. The first chunk of the tail has no
memory. Differences from the paper's model are in README.md.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn

LANDMARK = 0  # the token id that ends each chunk


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a model; window is in rows and a multiple of chunk."""

    vocab: int = 256
    hidden: int = 128
    heads: int = 4
    mlp: int = 512
    lower: int = 4
    encoder: int = 2
    upper: int = 4
    groups: int = 2
    chunk: int = 64
    window: int = 128
    topk: int = 8
    taps: int = 4

    def reach(self):
        """How many chunks before a chunk its lower half can see."""
        rows = self.lower * (self.window - 1) + self.taps
        return -(-rows // self.chunk)


def linear(n_in, n_out, gain=1.0):
    """A matrix without bias whose outputs have the inputs' scale times gain."""
    layer = nn.Linear(n_in, n_out, bias=False)
    nn.init.normal_(layer.weight, std=gain / math.sqrt(n_in))
    return layer


class Norm(nn.Module):
    """RMS norm with a weight."""

    def __init__(self, hidden):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-6)


class Mlp(nn.Module):
    """norm, up, GELU, down."""

    def __init__(self, c, gain):
        super().__init__()
        self.norm = Norm(c.hidden)
        self.up = linear(c.hidden, c.mlp)
        self.down = linear(c.mlp, c.hidden, gain)

    def forward(self, x):
        return self.down(F.gelu(self.up(self.norm(x)), approximate="tanh"))


def window_bias(c, n_chunks, dtype, device):
    """[n_chunks * heads, chunk, window + chunk]: ALiBi inside the window, -inf outside it."""
    back = c.window // c.chunk
    row = torch.arange(c.chunk, device=device)[:, None] + c.window
    key = torch.arange(c.window + c.chunk, device=device)[None]
    distance = row - key
    slopes = 2.0 ** (-8.0 * torch.arange(1, c.heads + 1, device=device) / c.heads)
    bias = -slopes[:, None, None] * distance
    bias = bias.masked_fill((distance < 0) | (distance >= c.window), -math.inf)
    bias = bias.expand(n_chunks, -1, -1, -1).clone()
    for t in range(min(back, n_chunks)):
        bias[t, :, :, : (back - t) * c.chunk] = -math.inf
    return bias.flatten(0, 1).to(dtype)


class WindowAttention(nn.Module):
    """Causal attention over the last `window` rows, computed chunk by chunk."""

    def __init__(self, c, gain):
        super().__init__()
        self.c = c
        self.norm = Norm(c.hidden)
        self.qkv = linear(c.hidden, 3 * c.hidden)
        self.out = linear(c.hidden, c.hidden, gain)

    def _windows(self, x):
        """[B, T, S, ..] -> [B, T, window + S, ..]: each chunk behind those its window reaches."""
        back, n = self.c.window // self.c.chunk, x.shape[1]
        x = F.pad(x, (0, 0, 0, 0, 0, 0, back, 0))
        return torch.cat([x[:, i : i + n] for i in range(back + 1)], dim=2)

    def _heads_out(self, x):
        """[B, T, R, H, d] -> [B, T * H, R, d]."""
        return x.transpose(2, 3).reshape(x.shape[0], -1, x.shape[2], x.shape[4])

    def forward(self, x, bias):
        b, n, s, hidden = x.shape
        qkv = self.qkv(self.norm(x)).view(b, n, s, 3, self.c.heads, -1)
        q, k, v = qkv.unbind(3)
        o = F.scaled_dot_product_attention(
            self._heads_out(q),
            self._heads_out(self._windows(k)),
            self._heads_out(self._windows(v)),
            attn_mask=bias.to(q.dtype).expand(b, -1, -1, -1),
        )
        o = o.view(b, n, self.c.heads, s, -1).transpose(2, 3)
        return self.out(o.reshape(b, n, s, hidden))


class LowerLayer(nn.Module):
    """Window attention and MLP."""

    def __init__(self, c, gain):
        super().__init__()
        self.attention = WindowAttention(c, gain)
        self.mlp = Mlp(c, gain)

    def forward(self, x, bias):
        x = x + self.attention(x, bias)
        return x + self.mlp(x)


class EncoderLayer(nn.Module):
    """Bidirectional attention inside a chunk, rotary positions 0 to chunk - 1, and MLP."""

    def __init__(self, c, gain):
        super().__init__()
        self.c = c
        self.norm = Norm(c.hidden)
        self.qkv = linear(c.hidden, 3 * c.hidden)
        self.out = linear(c.hidden, c.hidden, gain)
        self.mlp = Mlp(c, gain)
        half = c.hidden // c.heads // 2
        inv_freq = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.arange(c.chunk, dtype=torch.float64)[:, None] * inv_freq
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def _rotate(self, x):
        """x [n, H, S, d]: pairs (i, i + d/2)."""
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def forward(self, x):
        n, s, hidden = x.shape
        qkv = self.qkv(self.norm(x)).view(n, s, 3, self.c.heads, -1).transpose(1, 3)
        q, k, v = qkv.unbind(2)
        o = F.scaled_dot_product_attention(self._rotate(q), self._rotate(k), v)
        x = x + self.out(o.transpose(1, 2).reshape(n, s, hidden))
        return x + self.mlp(x)


class UpperLayer(nn.Module):
    """Window attention, attention to the group's retrieved chunks, MLP."""

    def __init__(self, c, gain):
        super().__init__()
        self.c = c
        self.attention = WindowAttention(c, gain)
        self.norm = Norm(c.hidden)
        self.query = linear(c.hidden, c.hidden)
        self.out = linear(c.hidden, c.hidden, gain)
        self.mlp = Mlp(c, gain)

    def _attend(self, x, retrieved):
        """x [B, U, S, hidden] -> the same shape."""
        b, n, s, hidden = x.shape
        o = retrieved.attend(self.query(self.norm(x)).view(b, n, s, self.c.heads, -1))
        return self.out(o.reshape(b, n, s, hidden))

    def forward(self, x, bias, retrieved):
        x = x + self.attention(x, bias)
        if retrieved is not None:
            x = x + F.pad(self._attend(x[:, 1:], retrieved), (0, 0, 0, 0, 1, 0))
        return x + self.mlp(x)


class Retrieved:
    """The chunks that a group uses: kv [B, n, k, 2, H, S, d], w [B, n, k]."""

    def __init__(self, kv, w):
        self.kv, self.w = kv, w

    def attend(self, q):
        """q [B, n, S, H, d] -> the same shape: one softmax a chunk, then the weighted sum."""
        b, n, s, heads, d = q.shape
        k, flat = self.kv.shape[2], self.kv.flatten(0, 2)
        q = q.transpose(2, 3)[:, :, None].expand(-1, -1, k, -1, -1, -1).flatten(0, 2)
        o = F.scaled_dot_product_attention(q, flat[:, 0], flat[:, 1]).view(b, n, k, heads, s, d)
        return torch.einsum("bnkhsd,bnk->bnshd", o, self.w.to(o.dtype))


class Memory:
    """
    The chunks that a tail may retrieve. Those of the body are landmarks [B or 1, N, hidden] f32 and
    kv [B or 1, N, 2, H, S, d] (1: one body shared by the batch); those of the tail itself follow.
    Where contexts differ from the shared body in few chunks, `tail` begins with those, and hidden
    [B, N + their number] says which of both are not to be retrieved.
    """

    def __init__(self, c, body, tail, gumbel=None, hidden=None):
        self.c, self.gumbel, self.hidden = c, gumbel, hidden
        self.body, self.tail = body, tail
        self.before = body[0].shape[1]
        self.skip = 0 if hidden is None else hidden.shape[1] - self.before
        self.scored = []  # what each group's retrieval scored, in order

    def retrieve(self, q):
        """q [B, U - 1, hidden] of a group -> what chunks 1 .. U - 1 of the tail retrieve."""
        ids, w = self.choose(self.scores(q))
        return Retrieved(self.gather(ids), w)

    def scores(self, q):
        """q [B, U - 1, hidden] of the tail's chunks -> [B, U - 1, before + U], -inf from t on."""
        q = q.float()
        with torch.autocast(q.device.type, enabled=False):  # choices and weights hang on them
            s = torch.cat([q @ side[0].transpose(1, 2) for side in (self.body, self.tail)], dim=2)
        t = self.before + self.skip + torch.arange(q.shape[1], device=q.device)
        i = torch.arange(s.shape[2], device=q.device)
        s = (s / math.sqrt(self.c.hidden)).masked_fill(i[None] >= t[:, None], -math.inf)
        if self.hidden is not None:
            s[:, :, : self.hidden.shape[1]].masked_fill_(self.hidden[:, None], -math.inf)
        self.scored.append(s)
        return s

    def choose(self, s):
        """(chunk ids, weights), both [B, U - 1, k]; candidates that are none weigh 0."""
        with torch.no_grad():
            ranked = s if self.gumbel is None else s + self.gumbel(s.shape)
            ids = ranked.topk(min(self.c.topk, s.shape[2]), dim=2).indices
        chosen = s.gather(2, ids)
        none = chosen == -math.inf
        return ids, torch.softmax(chosen.masked_fill(none, -1e30), dim=2) * ~none

    def gather(self, ids):
        """K and V of chunks ids [B, n, k] -> [B, n, k, 2, H, S, d]."""
        if torch.is_grad_enabled():
            return self._gather_by_product(ids)
        body, tail = self.body[1], self.tail[1]
        in_body = (ids < self.before).view(*ids.shape, 1, 1, 1, 1)
        rows = torch.arange(ids.shape[0], device=ids.device)[:, None, None]
        near = tail[rows, (ids - self.before).clamp(min=0)]
        if self.before == 0:
            return near
        far = body[rows if body.shape[0] > 1 else 0, ids.clamp(max=self.before - 1)]
        return torch.where(in_body, far, near)

    def _gather_by_product(self, ids):
        """The same by a product with one-hot rows, whose gradient is a product too: exact, and
        much faster than adding up the gradients of picked chunks one by one."""
        kv = torch.cat([self.body[1], self.tail[1]], dim=1)
        chunks = torch.arange(kv.shape[1], device=ids.device)
        hot = (ids.flatten(1)[:, :, None] == chunks).to(kv.dtype)
        return (hot @ kv.flatten(2)).view(*ids.shape, *kv.shape[2:])


class Model(nn.Module):
    """Tokens [B, T, chunk] in, logits of the tail's rows out."""

    def __init__(self, c):
        super().__init__()
        if c.window % c.chunk or c.upper % c.groups or c.hidden % (2 * c.heads):
            raise ValueError("window is whole chunks, groups are of equal size, heads are even")
        self.c = c
        gain = 1.0 / math.sqrt(2.0 * (c.lower + c.upper))
        self.embed = nn.Embedding(c.vocab, c.hidden)
        self.taps = nn.Parameter(torch.randn(c.taps, c.hidden) * 0.5)
        self.lower = nn.ModuleList(LowerLayer(c, gain) for _ in range(c.lower))
        self.encoder = nn.ModuleList(EncoderLayer(c, gain) for _ in range(c.encoder))
        self.encoder_norm = Norm(c.hidden)
        self.key = linear(c.hidden, c.hidden)
        self.value = linear(c.hidden, c.hidden)
        self.upper = nn.ModuleList(UpperLayer(c, gain) for _ in range(c.upper))
        self.query_norms = nn.ModuleList(Norm(c.hidden) for _ in range(c.groups))
        self.out_norm = Norm(c.hidden)
        self.head = linear(c.hidden, c.vocab)
        self._bias = {}
        self._begin_by_copying()

    @torch.no_grad()
    def _begin_by_copying(self):
        """Weights with which queries meet equal tokens and values come out as they went in: from
        there it is not far to copying the right thing from the right chunk."""
        nn.init.orthogonal_(self.value.weight)
        self.head.weight.copy_(self.embed.weight * (0.5 / math.sqrt(self.c.hidden)))
        for layer in self.upper:
            layer.query.weight.copy_(self.key.weight)
            layer.out.weight.copy_(self.value.weight.T)

    def bias(self, n_chunks, device):
        """The mask of n_chunks, kept: batches come in few lengths."""
        key = (n_chunks, str(device))
        if key not in self._bias:
            half = torch.device(device).type == "cuda"
            dtype = torch.bfloat16 if half else torch.float32
            self._bias[key] = window_bias(self.c, n_chunks, dtype, device)
        return self._bias[key]

    def lower_half(self, tokens):
        """tokens [B, T, S] -> [B, T, S, hidden]: embeddings mixed with those of the few tokens
        before (a causal convolution of one weight a channel), then the lower layers."""
        b, n, s = tokens.shape
        e = self.embed(tokens.reshape(b, n * s))
        x = e
        for j in range(self.c.taps):
            x = x + self.taps[j] * F.pad(e, (0, 0, j + 1, 0))[:, : n * s]
        x = x.view(b, n, s, -1)
        bias = self.bias(n, tokens.device)
        for layer in self.lower:
            x = layer(x, bias)
        return x

    def encode(self, x):
        """Output of the lower half -> landmarks [B, T, hidden] f32, kv [B, T, 2, H, S, d]."""
        b, n, s, hidden = x.shape
        e = x.flatten(0, 1)
        for layer in self.encoder:
            e = layer(e)
        e = self.encoder_norm(e).view(b, n, s, hidden)
        kv = torch.stack([self.key(e[:, :, :-1]), self.value(e[:, :, 1:])], dim=2)
        kv = F.pad(kv, (0, 0, 0, 1))
        kv = kv.view(b, n, 2, s, self.c.heads, -1).transpose(3, 4)
        return e[:, :, s - 1].float(), kv

    def upper_half(self, x, memory):
        """x [B, U, S, hidden] of the tail -> logits [B, U, S, vocab]."""
        bias = self.bias(x.shape[1], x.device)
        size = self.c.upper // self.c.groups
        for g, norm in enumerate(self.query_norms):
            retrieved = memory.retrieve(norm(x[:, :-1, -1])) if x.shape[1] > 1 else None
            for layer in self.upper[g * size : (g + 1) * size]:
                x = layer(x, bias, retrieved)
        return self.head(self.out_norm(x))

    def forward(self, tokens, n_tail, gumbel=None, scored=None):
        """Logits [B, n_tail, S, vocab] of the last n_tail chunks; scored, a list, takes the scores
        [B, n_tail - 1, T] of every group's retrievals."""
        x = self.lower_half(tokens)
        marks, kv = self.encode(x)
        cut = tokens.shape[1] - n_tail
        body, tail = (marks[:, :cut], kv[:, :cut]), (marks[:, cut:], kv[:, cut:])
        memory = Memory(self.c, body, tail, gumbel)
        logits = self.upper_half(x[:, cut:], memory)
        if scored is not None:
            scored += memory.scored
        return logits
