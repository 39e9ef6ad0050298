"""
Long contexts, encoded once: many contexts that share their filler and differ where needles lie.

The filler's landmarks and chunks are made in pieces. Of a context with needles, only the chunks
from which the lower half sees one are encoded anew; the model then meets exactly the landmarks and
chunks of that context (test_gca.py compares it with the whole one).
"""

import numpy as np
import torch

from . import data
from .model import Memory


class Haystack:
    """n_body chunks of filler in device memory: 64 KiB a chunk at hidden 128."""

    def __init__(self, model, n_body, rng, device):
        self.model, self.device, self.n_body = model, device, n_body
        self.filler = data.plain(rng, n_body, data.CHUNK).astype(np.uint8)
        self.filler[:, data.TEXT] = 0
        self.marks, self.kv = self._encode_filler()

    @torch.no_grad()
    def _encode(self, chunks, keep):
        """Landmarks and kv of the last `keep` chunks of each row of [B, n, 64]."""
        tokens = torch.from_numpy(chunks.astype(np.int64)).to(self.device)
        return self.model.encode(self.model.lower_half(tokens)[:, -keep:])

    def _encode_filler(self, piece=256):
        c, n = self.model.c, self.n_body
        marks = torch.empty(1, n, c.hidden, device=self.device)
        shape = (2, c.heads, c.chunk, c.hidden // c.heads)
        kv = torch.empty(1, n, *shape, device=self.device)
        for at in range(0, n, piece):
            end = min(at + piece, n)
            first = max(0, at - c.reach())
            marks[:, at:end], kv[:, at:end] = self._encode(self.filler[None, first:end], end - at)
        return marks, kv

    def _touched(self, row):
        """The chunks of one context [n_body + U, 64] that are not what they are in the filler."""
        needles = np.flatnonzero((row[: self.n_body] != self.filler).any(axis=1))
        ids = np.unique(needles[:, None] + np.arange(self.model.c.reach() + 1))
        return ids[ids < self.n_body]

    def _patch(self, tokens):
        """What differs in contexts [B, n_body + U, 64]: (hidden, marks, kv), padded to the most."""
        touched, reach = [self._touched(row) for row in tokens], self.model.c.reach()
        most = max(map(len, touched))
        hidden = torch.zeros(len(tokens), self.n_body + most, dtype=torch.bool, device=self.device)
        marks = self.marks.new_zeros(len(tokens), most, self.marks.shape[2])
        kv = self.kv.new_zeros(len(tokens), most, *self.kv.shape[2:])
        for b, ids in enumerate(touched):
            hidden[b, torch.from_numpy(ids).to(self.device)] = True
            hidden[b, self.n_body + len(ids) :] = True
            whole = ids >= reach
            windows = tokens[b, ids[whole, None] + np.arange(-reach, 1)]
            parts = [self._encode(tokens[b, None, : i + 1], 1) for i in ids[~whole]]
            if whole.any():
                parts.append([part.transpose(0, 1) for part in self._encode(windows, 1)])
            marks[b, : len(ids)] = torch.cat([part[0] for part in parts], dim=1)[0]
            kv[b, : len(ids)] = torch.cat([part[1] for part in parts], dim=1)[0]
        return hidden, marks, kv

    @torch.no_grad()
    def logits(self, tokens, n_tail):
        """What the model says of the tails of contexts [B, n_body + n_tail, 64] over the filler."""
        hidden, marks, kv = self._patch(tokens)
        reach = min(self.model.c.reach(), self.n_body)
        last = tokens[:, self.n_body - reach :].astype(np.int64)
        x = self.model.lower_half(torch.from_numpy(last).to(self.device))[:, reach:]
        own = self.model.encode(x)
        near = (torch.cat([marks, own[0]], dim=1), torch.cat([kv, own[1]], dim=1))
        memory = Memory(self.model.c, (self.marks, self.kv), near, hidden=hidden)
        return self.model.upper_half(x, memory)

    def ask(self, rng, kinds, n_rows, n_keys, n_links):
        """(right, asked) of n_rows contexts with these questions and needles at random places."""
        tokens, labels, _, answers = data.batch(
            rng, n_rows, self.n_body, kinds, n_keys, n_links, filler=self.filler
        )
        logits = self.logits(tokens, labels.shape[1])
        labels = torch.from_numpy(labels).to(self.device)
        rights = [ok for _, ok in data.right(logits, labels, answers)]
        return int(torch.stack(rights).sum()), len(rights) * n_rows


def questions(model, device, rng, kind, n_tokens, n_questions, n_contexts=3, n_rows=10):
    """(right, asked) over n_contexts fillers of n_tokens: a passkey's context is asked once, others
    up to six times."""
    kinds = [kind] * (1 if kind == data.PASSKEY else 6)
    n_body = n_tokens // data.CHUNK - data.tail_chunks(kinds)
    n_keys, n_links = data.beside(kind, n_body)
    n_right = done = 0
    for i in range(n_contexts):
        stack = Haystack(model, n_body, rng, device)
        wanted = -(-n_questions * (i + 1) // n_contexts)
        while done < wanted:
            rows = min(n_rows, -(-(wanted - done) // len(kinds)))
            right, asked = stack.ask(rng, kinds, rows, n_keys, n_links)
            n_right, done = n_right + right, done + asked
    return n_right, done
