"""How near the run is to what it stands for, teacher-forced: the same tokens on both sides.

(a) Inside the model's window: against stock full attention, over whole chunks.
(b) Beyond it: against exact, uncompressed selection on the same keys and values. A second worker
    without a store keeps every row; it gets the first one's K and V while the prefix is read.
"""

import time

import torch

from kvasir import Worker
from kvasir.hf import KvasirCache, Observer
from stock import CHUNK, Taps


def difference(logits, want_logits, out, want_out):
    """
    Agreement of two runs: logits [n, vocabulary]; out [n_layers, n, width], the attention outputs.
    Relative errors are |a - b| / |b| per layer over all positions.
    """
    p, q = logits.float().log_softmax(-1), want_logits.float().log_softmax(-1)
    error = (out.float() - want_out.float()).flatten(1).norm(dim=1)
    relative = error / want_out.float().flatten(1).norm(dim=1)
    return {
        "positions": len(logits),
        "top1": float((p.argmax(-1) == q.argmax(-1)).float().mean()),
        "kl": float((q.exp() * (q - p)).sum(-1).mean()),
        "attention_error": float(relative.mean()),
        "attention_error_first_layer": float(relative[0]),
        "attention_error_worst_layer": float(relative.max()),
    }


def inside_firsts(n_tokens, window):
    """Chunks to compare with stock: one that is attended in full, later ones that are selected."""
    end = min(n_tokens, window)
    firsts = {CHUNK * 3, (end // 2 // CHUNK) * CHUNK - CHUNK, (end // CHUNK) * CHUNK - CHUNK}
    return sorted(f for f in firsts if 0 <= f <= end - CHUNK)


def inside(model, base, attachment, ids, want):
    """(a) {first: difference}: each chunk again, over a prefix that the store gives back."""
    result = {}
    for first, (want_logits, want_out) in want.items():
        with attachment.cache(ids[: first + CHUNK]) as cache:
            if cache.n_tokens > first:
                raise RuntimeError(f"reused {cache.n_tokens} tokens, at most {first} were wanted")
            attachment.prefill(cache, ids[:first])
            taps, before = Taps(base), cache.stats()
            chunk = torch.tensor([ids[first : first + CHUNK]])
            logits = model(chunk, past_key_values=cache).logits[0]
            result[first] = difference(logits, want_logits, taps.close(), want_out)
            result[first]["full"] = cache.stats()["full_steps"] > before["full_steps"]
    return result


class Shadow(Observer):
    """The second worker of (b): exact index, every row resident, fed by the first one's passes."""

    def __init__(self, geometry, selector, options):
        self.worker = Worker(geometry, "shadow", selector, index="exact", **options)
        self.sequence = self.worker.sequence()
        self.seconds = 0.0  # spent here, inside the first worker's passes

    @staticmethod
    def bytes_needed(geometry, n_tokens):
        """Rows and exact keys."""
        return n_tokens * geometry.n_layers * geometry.row_bytes * 3 // 2

    def on_pass(self, cache, ids):
        """Follows the pass."""
        start = time.monotonic()
        self.sequence.tokens(ids)
        self.seconds += time.monotonic() - start

    def on_layer(self, cache, layer, q, k, v, out):
        """Takes the same keys and values."""
        start = time.monotonic()
        self.sequence.append(layer, k, v)
        self.seconds += time.monotonic() - start

    def close(self):
        """Frees its rows."""
        self.worker.close()


def _teach(model, base, cache, tokens):
    """Feeds tokens one by one: (logits, attention outputs, picks by token and layer)."""
    taps, logits, picks = Taps(base), [], []
    for token in tokens:
        logits.append(model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1])
        picks.append([set(cache.picks(i).tolist()) for i in range(len(base.layers))])
    return torch.stack(logits), taps.close(), picks


def beyond(model, base, attachment, cache, shadow, tokens):
    """(b) difference over the decoded tokens, and the share of exact picks that the run made."""
    attachment.observer = None
    logits, out, picks = _teach(model, base, cache, tokens)
    exact = KvasirCache(attachment, [shadow.sequence])
    want_logits, want_out, want_picks = _teach(model, base, exact, tokens)
    result = difference(logits, want_logits, out, want_out)
    shares = [len(a & b) / len(b) for x, y in zip(picks, want_picks) for a, b in zip(x, y) if b]
    result["recall"] = sum(shares) / len(shares) if shares else None
    return result
