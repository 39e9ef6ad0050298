"""
python -m kvasir.gca.stored: the model's answers with its memory in a worker, and in a store.

Torch runs the model; landmarks, chunks, retrieval and attention to chunks are the worker's
(libkvw.so), which keeps them in a cachesvc where --store names one. The body goes through the lower
half and the encoder in pieces, each with as many chunks before it as the lower half can see.
"""

import argparse
import hashlib
import time

import numpy as np
import torch

from .. import Client, Geometry, Rope, Worker
from ..retriever import Retriever
from . import data, evaluate


def fingerprint(model):
    """Of every weight."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def open_worker(model, client=None, **options):
    """A Worker for the memory of a model; other weights never share chunks."""
    c = model.c
    geometry = Geometry(1, c.heads, c.heads, c.hidden // c.heads, "float32", Rope(0.0))
    defaults = dict(k=c.topk, landmark_dim=c.hidden, n_sink=c.chunk, n_recent=c.window)
    defaults.update(block_tokens=c.chunk, chunk_tokens=16 * c.chunk)
    options = {"revision": fingerprint(model), **defaults, **options}
    return Worker(geometry, "kvasir-gca", "gca", client, **options)


class StoredMemory:
    """The chunks of one context, held by a Sequence; in the place of model.Memory for one tail."""

    def __init__(self, model, sequence):
        self.model, self.sequence, self.before = model, sequence, 0
        self.last = torch.zeros(0, model.c.chunk, dtype=torch.int64)  # for the next piece to see

    def _rows(self, kv, which):
        """K or V of chunks [n, 2, H, S, d] as the worker's rows [n * S, H, d]."""
        return kv[:, which].transpose(1, 2).flatten(0, 1).contiguous()

    @torch.no_grad()
    def append(self, chunks):
        """Encodes chunks [n, S] (n <= the worker's chunk_tokens / S) and appends them as a pass;
        the lower half's output of them [1, n, S, hidden]."""
        seen = len(self.last)
        x = self.model.lower_half(torch.cat([self.last, chunks])[None])[:, seen:]
        marks, kv = self.model.encode(x)
        self.sequence.tokens(chunks.flatten())
        k, v = self._rows(kv[0], 0), self._rows(kv[0], 1)
        self.sequence.append_chunks(0, k, v, marks[0].contiguous())
        self.last = torch.cat([self.last, chunks])[-self.model.c.reach() :]
        return x

    def append_body(self, chunks, piece=16):
        """Appends chunks [n, S], `piece` at a time."""
        for at in range(0, len(chunks), piece):
            self.append(chunks[at : at + piece])
        self.before += len(chunks)

    @torch.no_grad()
    def answer(self, tail):
        """Logits [1, U, S, vocab] of a tail [U, S], which is not part of the body afterwards."""
        last, held = self.last, len(self.sequence)
        x = self.append(tail)
        self.retrievers = []
        logits = self.model.upper_half(x, self)
        for retriever in self.retrievers:
            retriever.close()
        self.sequence.truncate(held)
        self.last = last
        return logits

    def retrieve(self, q):
        """q [1, U - 1, hidden] of a group: what each chunk of the tail but the first retrieves."""
        chosen = [Retriever(self.sequence) for _ in range(q.shape[1])]
        self.retrievers += chosen
        for i, retriever in enumerate(chosen):
            retriever.retrieve(q[0, i].float().contiguous(), self.before + i)
        return StoredRetrieved(chosen)


class StoredRetrieved:
    """What model.Retrieved is, by one Retriever a chunk."""

    def __init__(self, retrievers):
        self.retrievers = retrievers

    def attend(self, q):
        """q [1, n, S, H, d] -> the same shape."""
        out = [r.attend(q[0, i].contiguous()) for i, r in enumerate(self.retrievers)]
        return torch.stack(out)[None]


def ask(model, worker, kind, n_tokens, rng):
    """(right, asked, statistics of the sequence): one context of n_tokens, up to 6 questions."""
    kinds = [kind] * (1 if kind == data.PASSKEY else 6)
    n_body = n_tokens // data.CHUNK - data.tail_chunks(kinds)
    n_keys, n_links = data.beside(kind, n_body)
    tokens, labels, _, answers = data.batch(rng, 1, n_body, kinds, n_keys, n_links)
    tokens, labels = torch.from_numpy(tokens[0]), torch.from_numpy(labels)
    with worker.sequence() as sequence:
        memory = StoredMemory(model, sequence)
        memory.append_body(tokens[:n_body])
        sequence.flush()
        logits = memory.answer(tokens[n_body:])
        rights = [bool(ok[0]) for _, ok in data.right(logits, labels, answers)]
        return sum(rights), len(rights), sequence.stats()


def parser():
    """The command line."""
    p = argparse.ArgumentParser(prog="kvasir.gca.stored", description="Answers through a worker.")
    p.add_argument("--weights", required=True, help="model.safetensors")
    p.add_argument("--store", help="URI of a cachesvc; without it everything stays resident")
    p.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    p.add_argument("--kinds", nargs="+", choices=data.KINDS, default=list(data.KINDS))
    p.add_argument("--contexts", type=int, default=3, help="of each kind and length")
    p.add_argument("--seed", type=int, default=13)
    return p


def main(args):
    """Prints one line a kind and length."""
    model = evaluate.load(args.weights, "cpu")
    client = Client(args.store) if args.store else None
    with open_worker(model, client) as worker:
        for tokens in args.tokens:
            for kind in args.kinds:
                start, n_right, n, fetched = time.monotonic(), 0, 0, 0
                rng = np.random.default_rng([args.seed, tokens])
                for _ in range(args.contexts):
                    ok, asked, stats = ask(model, worker, kind, tokens, rng)
                    n_right, n, fetched = n_right + ok, n + asked, fetched + stats["bytes_fetched"]
                low, high = evaluate.wilson(n_right, n)
                print(
                    f"{kind} {tokens}: {n_right} of {n} right ({100 * low:.1f} to "
                    f"{100 * high:.1f} %), {fetched} bytes fetched, "
                    f"{time.monotonic() - start:.1f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main(parser().parse_args())
