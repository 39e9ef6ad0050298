"""The Cache that transformers sees: it counts tokens and keeps nothing.

A forward pass goes update() -> attention function, layer by layer, in one thread; the attention
function is not told the cache, so update() leaves the sequence in a thread-local for it.
"""

import threading

from transformers.cache_utils import Cache

_current = threading.local()


def current():
    """The cache whose update() ran last in this thread, or None."""
    return getattr(_current, "cache", None)


def set_current(cache):
    """Names the cache of the pass that runs in this thread; None ends it."""
    _current.cache = cache


class KvasirCache(Cache):
    """
    One sequence of a worker, as a transformers Cache. Made by Attachment.cache(); pass it as
    past_key_values to forward() or generate(). .n_reused tokens of the prompt are there already.
    Close it (or drop it) when done.
    """

    is_compileable = False

    def __init__(self, attachment, sequence):
        super().__init__(layers=[])
        self.attachment = attachment
        self.sequence = sequence
        self.n_reused = sequence.n_reused
        self.n_tokens = len(sequence)
        self.broken = None  # the error that left layers at different lengths

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Keeps nothing; the attention function of the same layer appends."""
        set_current(self)
        return key_states, value_states

    def check(self):
        """Raises if an earlier pass failed half way."""
        if self.broken is not None:
            raise RuntimeError(f"this cache ended with an earlier error: {self.broken}")

    def get_seq_length(self, layer_idx=0):
        """Tokens that every layer holds."""
        return self.n_tokens

    def get_mask_sizes(self, query_length, layer_idx=0):
        """Lengths that a mask would have; none is built."""
        length = query_length if isinstance(query_length, int) else len(query_length)
        return self.n_tokens + length, 0

    def get_query_offset(self, layer_idx=0):
        """Position of the next token."""
        return self.n_tokens

    def get_max_length(self, layer_idx=None):
        """No limit."""
        return -1

    def get_max_cache_shape(self, layer_idx=0):
        """No limit."""
        return -1

    def crop(self, max_length):
        """Takes back tokens of the last pass: to max_length, or -max_length fewer."""
        keep = max_length if max_length >= 0 else self.n_tokens + max_length
        if keep < self.n_tokens:
            self.sequence.truncate(keep)
            self.n_tokens = keep

    def reorder_cache(self, beam_idx):
        """Beam search would need copies of a sequence."""
        raise NotImplementedError("kvasir: beam search is not supported; use num_beams=1")

    def batch_repeat_interleave(self, repeats):
        """Several returned sequences would need copies of a sequence."""
        if repeats != 1:
            raise NotImplementedError("kvasir: one sequence per cache; use num_return_sequences=1")

    def picks(self, layer):
        """Positions that the layer's last selection chose."""
        return self.sequence.picks(layer)

    def stats(self):
        """The sequence's counters."""
        return self.sequence.stats()

    def flush(self, timeout_s=None):
        """Waits until every full block is in the store."""
        self.sequence.flush(timeout_s)

    def close(self):
        """Puts what is full and frees the worker's memory of it."""
        self.sequence.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
