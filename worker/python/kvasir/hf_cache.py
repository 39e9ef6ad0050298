"""The Cache that transformers sees: it counts tokens and keeps nothing.

A forward pass goes update() -> attention function, layer by layer, in one thread; the attention
function is not told the cache, so update() leaves the sequence in a thread-local for it.
"""

import contextlib
import threading

import torch
from transformers.cache_utils import Cache

from .batch import Batch

_current = threading.local()


def current():
    """The cache whose update() ran last in this thread, or None."""
    return getattr(_current, "cache", None)


def set_current(cache):
    """Names the cache of the pass that runs in this thread; None ends it."""
    _current.cache = cache


def open_alike(worker, prompts, adapter, salt):
    """
    A Sequence for each of prompts, all with as many tokens from the store: those of which more are
    there are opened again with fewer.
    """
    with contextlib.ExitStack() as opened:
        sequences = [opened.enter_context(worker.sequence(p, adapter, salt)) for p in prompts]
        least = min(s.n_reused for s in sequences)
        while any(s.n_reused != least for s in sequences):
            for i, sequence in enumerate(sequences):
                if sequence.n_reused > least:
                    sequence.close()
                    fewer = prompts[i][: least + 1] if least else ()
                    sequences[i] = opened.enter_context(worker.sequence(fewer, adapter, salt))
            least = min(s.n_reused for s in sequences)
        opened.pop_all()
    return sequences


class KvasirCache(Cache):
    """
    One or several sequences of a worker, of one length, as a transformers Cache. Made by
    Attachment.cache(); pass it as past_key_values to forward() or generate(). .n_reused tokens of
    the prompt are there already. .sequence is the first of .sequences. Close it (or drop it) when
    done.
    """

    is_compileable = False

    def __init__(self, attachment, sequences):
        super().__init__(layers=[])
        self.attachment = attachment
        self.sequences = sequences
        self.sequence = sequences[0]
        self.batch = Batch(attachment.worker, len(sequences)) if len(sequences) > 1 else None
        self.n_reused = self.sequence.n_reused
        self.n_tokens = len(self.sequence)
        self.broken = None  # the error that left layers or sequences at different lengths

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Keeps nothing; the attention function of the same layer appends."""
        set_current(self)
        return key_states, value_states

    def forward(self, layer, query, key, value):
        """
        Attention of a layer for all sequences: query [B, Hq, T, d], key and value [B, Hkv, T, d];
        [B, T, Hq, d]. A token of each is one call, longer passes go one by one.
        """
        rows = [x.transpose(1, 2).contiguous() for x in (query, key, value)]
        if rows[0].shape[1] == 1:
            return self.batch.forward(self.sequences, layer, *(x[:, 0] for x in rows))[:, None]
        out = torch.empty_like(rows[0])
        for i, sequence in enumerate(self.sequences):
            sequence.forward(layer, *(x[i] for x in rows), out=out[i])
        return out

    def each(self, call):
        """
        call(i, sequence) of each. An error of the first leaves all as they were, and the call may
        be repeated; one of another breaks the cache, whose sequences differ then.
        """
        for i, sequence in enumerate(self.sequences):
            try:
                call(i, sequence)
            except BaseException as error:
                self.broken = error if i else self.broken
                raise

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
            self.each(lambda _, sequence: sequence.truncate(keep))
            self.n_tokens = keep

    def reorder_cache(self, beam_idx):
        """Beam search would need copies of a sequence."""
        raise NotImplementedError("kvasir: beam search is not supported; use num_beams=1")

    def batch_repeat_interleave(self, repeats):
        """Several returned sequences would need copies of a sequence."""
        if repeats != 1:
            raise NotImplementedError("kvasir: no copies of a sequence; use num_return_sequences=1")

    def picks(self, layer):
        """Positions that the layer's last selection chose, of the first sequence."""
        return self.sequence.picks(layer)

    def stats(self):
        """Counters, of all sequences together."""
        every = [sequence.stats() for sequence in self.sequences]
        return {name: sum(stats[name] for stats in every) for name in every[0]}

    def flush(self, timeout_s=None):
        """Waits until every full block is in the store."""
        for sequence in self.sequences:
            sequence.flush(timeout_s)

    def close(self):
        """Puts what is full and frees the worker's memory of it."""
        if self.batch is not None:
            self.batch.close()
        for sequence in self.sequences:
            sequence.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
