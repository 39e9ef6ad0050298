"""Records which tokens a real model's decode steps pick: traces for residency_bench --trace.

The model reads the first --tokens tokens of a text through a worker on the CPU, in chunks and with
the greatest k; the --steps tokens that follow in the text are then decoded one by one. What passed
by (queries and keys before RoPE, of all layers) is given to a worker of each k, whose picks are
written. No store: which rows are resident changes no pick. Needs torch, transformers and libkvw.so
(KVASIR_LIB, or the newest build); the projection is kvasir.calibrate's, of the same selector.

    PYTHONPATH=worker/python python tests/bench/record_picks.py --model DIR --text FILE
        --selector esa|tokenselect --projection FILE --dims N --out DIR [--tokens N] [--steps N]
        [--k N ...] [--layers N ...]

Writes DIR/SELECTOR-TOKENS-K.picks, in the format that residency_bench.c describes.
"""

import argparse
import struct
import time
from pathlib import Path

import numpy as np
import torch

import kvasir
from kvasir import hf_model
from kvasir.calibrate import load_model, token_slice

MAGIC = b"kvpicks1"
SETTINGS = {"esa": {"n_recent": 1024, "eps": 1}, "tokenselect": {"n_recent": 512}}
N_SINK = 128


class Recorder(kvasir.hf.Observer):
    """Keys of all passes and queries of those of one token: [layer][pass]."""

    def __init__(self, n_layers):
        self.keys = [[] for _ in range(n_layers)]
        self.queries = [[] for _ in range(n_layers)]

    def on_layer(self, cache, layer, q, k, v, out):
        """A layer attended."""
        self.keys[layer].append(k.clone())
        if len(q) == 1:
            self.queries[layer].append(q.clone())


def read(model, ids, n_steps, options):
    """The model over ids, the last n_steps of them one at a time; a Recorder."""
    start, n = time.monotonic(), len(ids) - n_steps
    with kvasir.attach(model, None, **options) as kv, kv.cache() as cache:
        kv.observer = Recorder(kv.geometry.n_layers)
        kv.prefill(cache, ids[:n])
        print(f"{n} tokens read in {time.monotonic() - start:.0f} s", flush=True)
        for i in range(n, len(ids)):
            kv.prefill(cache, ids[: i + 1])
        print(f"{n_steps} decoded; {time.monotonic() - start:.0f} s", flush=True)
        return kv.observer


def replay(model, ids, recorder, options):
    """The picks of the same steps under other options: [layer][step] of ascending positions."""
    geometry, name = hf_model.geometry_of(model)[0], hf_model.model_id(model)
    n_steps, at = len(recorder.queries[0]), 0
    picks = [[] for _ in range(geometry.n_layers)]
    with kvasir.Worker(geometry, name, **options) as worker, worker.sequence() as sequence:
        for i in range(len(recorder.keys[0])):
            n, step = len(recorder.keys[0][i]), i - len(recorder.keys[0]) + n_steps
            sequence.tokens(ids[at : at + n])
            for layer, keys in enumerate(recorder.keys):
                sequence.append(layer, keys[i], keys[i])  # no value is ever attended to
                if step >= 0:
                    with sequence.step(layer, recorder.queries[layer][step]):
                        picks[layer].append(sequence.picks(layer))
            at += n
    return picks


def leb128(numbers):
    """Seven bits a byte, the lowest first; all but a number's last byte have the highest set."""
    numbers = np.asarray(numbers, np.uint64)[:, None] >> np.arange(0, 35, 7, dtype=np.uint64)
    more = (numbers >> np.uint64(7)) > 0
    out = (numbers & np.uint64(0x7F)).astype(np.uint8) | (more.astype(np.uint8) << 7)
    used = np.hstack([np.ones((len(out), 1), bool), more[:, :-1]])
    return out[used].tobytes()


def write(path, picks, n_positions):
    """Writes [layer][step] of picks."""
    with open(path, "wb") as f:
        f.write(MAGIC + struct.pack("<III", len(picks), len(picks[0]), n_positions))
        for layer in picks:
            for step in layer:
                f.write(leb128([len(step)]) + leb128(np.diff(step.astype(np.int64), prepend=0)))
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB", flush=True)


def parse():
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    p.add_argument("--model", required=True, help="a folder that transformers can load")
    p.add_argument("--text", required=True)
    p.add_argument("--selector", required=True, choices=sorted(SETTINGS))
    p.add_argument("--projection", required=True, help="of kvasir.calibrate")
    p.add_argument("--dims", required=True, type=int, help="columns of the index")
    p.add_argument("--out", required=True, type=Path)
    p.add_argument("--tokens", type=int, default=32768)
    p.add_argument("--steps", type=int, default=512)
    p.add_argument("--k", type=int, nargs="+", default=[256, 512, 1024, 2048])
    p.add_argument("--layers", type=int, nargs="*", help="those to write; default: all")
    return p.parse_args()


def main():
    """Runs it."""
    args = parse()
    model, tokenizer = load_model(args.model, "bfloat16")
    n = args.tokens + args.steps
    ids = token_slice(tokenizer, args.text, n)
    if len(ids) < n:
        raise SystemExit(f"{args.text} has {len(ids)} tokens, not {n}")
    args.out.mkdir(parents=True, exist_ok=True)
    options = {"selector": args.selector, "index": "compressed", "projection": args.projection}
    options |= {"index_dims": args.dims, "n_sink": N_SINK, **SETTINGS[args.selector]}
    with torch.inference_mode():
        recorder = read(model, ids, args.steps, {**options, "k": max(args.k)})
        for k in args.k:
            picks = replay(model, ids, recorder, {**options, "k": k})
            picks = [picks[i] for i in args.layers or range(len(picks))]
            write(args.out / f"{args.selector}-{args.tokens}-{k}.picks", picks, n)


if __name__ == "__main__":
    main()
