"""A real model on a GPU over a long text: what tests/gpu/run cannot bring along.

Needs a GPU, torch and transformers, libkvw.so with CUDA (KVASIR_LIB), a cachesvc on this host (its
URI, best over shm), the quickstart's model (a GGUF) and a text. Prints, one line each: what the
stock model can do within its window (the ceiling), the time of prefill and of a decoded token, what
became of each question and in how many layers its tokens were picked, and how far the GPU's
attention is from the CPU backend's on the same queries, keys and values. Exit status 0; 1 where the
two backends differ by more than bf16 does.

    python tests/gpu/real_model.py --server URI --gguf FILE --text FILE --state DIR [--tokens N ...]
        [--setting SELECTOR:DIMS:K] [--skip-ceiling] [--skip-cpu]

Each context of N tokens has four passkeys and three verses, as the quickstart's of that length. A
setting: the columns that the index keeps for each of its heads, and the picks.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "deploy" / "quickstart.d"), str(ROOT / "worker" / "python")]

import numpy as np
import stock
import torch
from context import Builder, load_verses

import kvasir
from kvasir import hf_model
from kvasir.activations import collect
from kvasir.calibrate import fit

N_SINK = 128
N_RECENT = {"esa": 1024, "tokenselect": 512}  # of ESA far_position, too
EPS = {"esa": 1, "tokenselect": 0}
CALIBRATION_TOKENS, REPLAYED = 24576, 8192


def say(name, value):
    """One line of the table."""
    print(f"{name:42} {value}", flush=True)


def timed(fn):
    """fn() and its seconds, the GPU's work included."""
    torch.cuda.synchronize()
    start = time.monotonic()
    out = fn()
    torch.cuda.synchronize()
    return out, time.monotonic() - start


def continued(model, cache, ask, n):
    """n tokens after ask, greedily, a token a pass; and the seconds of a pass, each."""
    fed, answer, seconds = list(ask), [], []
    while len(answer) < n:
        token = fed.pop(0) if fed else answer[-1]
        ids = torch.tensor([[token]], device="cuda")
        logits, took = timed(lambda: model(ids, past_key_values=cache, logits_to_keep=1).logits)
        seconds.append(took)
        if not fed:
            answer.append(int(logits[0, -1].argmax()))
    return answer, seconds


def ceiling(model, builder):
    """Passkeys and verse tokens that the stock model has right within its own window."""
    right = {"passkey": [0, 0], "verse": [0, 0]}
    for context in stock.ceiling_contexts(builder):
        cache = stock.DynamicCache(config=model.config)
        for i in range(0, len(context.ids), stock.CHUNK):
            ids = torch.tensor([context.ids[i : i + stock.CHUNK]], device="cuda")
            model(ids, past_key_values=cache, logits_to_keep=1)
        for question in context.questions:
            answer, _ = continued(model, cache, question.ask, len(question.answer))
            cache.crop(len(context.ids) - cache.get_seq_length())
            count(right, question, answer)
    return right


def count(right, question, answer):
    """A passkey is right as a whole, a verse up to its first wrong token."""
    n = stock.leading(answer, question.answer)
    part = float(n == len(question.answer)) if question.kind == "passkey" else n / len(answer)
    right[question.kind][0] += part
    right[question.kind][1] += 1


def rates(right):
    """As text."""
    return ", ".join(f"{kind}s {got:.1f} of {n}" for kind, (got, n) in right.items())


class Recorder(kvasir.hf.Observer):
    """Keeps what passes by, up to REPLAYED tokens: [pass][layer] of (q, k, v, out) on the CPU."""

    def __init__(self):
        self.ids, self.passes, self.picks = [], [], []

    def on_pass(self, cache, ids):
        """A pass begins."""
        if cache.n_tokens < REPLAYED:
            self.ids.append(ids.tolist())
            self.passes.append([])
            self.picks.append([])

    def on_layer(self, cache, layer, q, k, v, out):
        """A layer attended."""
        if cache.n_tokens < REPLAYED:
            self.passes[-1].append([x.cpu() for x in (q, k, v, out)])
            self.picks[-1].append(cache.picks(layer))


def replay(recorder, geometry, model_name, options):
    """The same through the CPU backend: (worst difference of outputs, picks in common)."""
    worst, shared, picked = 0.0, 0, 0
    worker = kvasir.Worker(geometry, model_name, **{**options, "backend": "cpu"})
    with worker, worker.sequence() as sequence:
        for ids, layers, picks in zip(recorder.ids, recorder.passes, recorder.picks):
            sequence.tokens(ids)
            for layer, (q, k, v, out) in enumerate(layers):
                want = sequence.forward(layer, q, k, v).float()
                scale = float(want.abs().max())
                worst = max(worst, float((out.float() - want).abs().max()) / scale)
                mine = sequence.picks(layer)
                shared += len(np.intersect1d(mine, picks[layer]))
                picked += len(mine)
    return worst, shared / max(1, picked)


def parse():
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    p.add_argument("--server", required=True)
    p.add_argument("--gguf", required=True)
    p.add_argument("--text", required=True)
    p.add_argument("--state", required=True, type=Path)
    p.add_argument("--tokens", type=int, nargs="*", default=[32768, 1000000])
    p.add_argument("--setting", default="esa:62:4096", metavar="SELECTOR:DIMS:K")
    p.add_argument("--skip-ceiling", action="store_true")
    p.add_argument("--skip-cpu", action="store_true")
    return p.parse_args()


def in_worker(stats):
    """Seconds that calls of the worker took."""
    return sum(stats[f"ns_{name}"] for name in ("append", "select", "attend")) / 1e9


def picked(cache, question):
    """In how many layers the last selection has one of the question's tokens."""
    layers = range(cache.attachment.geometry.n_layers)
    return sum(np.isin(question.positions, cache.picks(i)).any() for i in layers)


def ask(kv, model, context, right):
    """The questions, each over the prefix from the store; (ms a token, of it in the worker)."""
    seconds, worker, layers = [], [], []
    for question in context.questions:
        start = time.monotonic()
        with kv.cache(context.ids + question.ask) as cache:
            kv.prefill(cache, context.ids)
            opened, before = time.monotonic() - start, in_worker(cache.stats())
            answer, took = continued(model, cache, question.ask, 1)
            layers.append(picked(cache, question))
            more, later = continued(model, cache, answer, len(question.answer) - 1)
            answer, took = answer + more, took + later
            seconds += took[2:]
            worker.append((in_worker(cache.stats()) - before) / len(took))
            count(right, question, answer)
            n = stock.leading(answer, question.answer)
        told = f"{n} of {len(answer)} tokens right, picked in {layers[-1]} layers"
        name = f"  {question.kind} {question.name}, depth {question.depth:.0%}"
        say(name, f"{told}; {opened:.1f} s to open")
    return np.median(seconds) * 1e3, np.median(worker) * 1e3, np.mean(layers)


def rates_of(n_tokens):
    """Says the rate of each quarter of a prefill, beyond what is recorded."""
    last = [REPLAYED, time.monotonic()]

    def progress(n_done, _):
        n, took = n_done - last[0], time.monotonic() - last[1]
        if n >= n_tokens // 4 or n_done == n_tokens:
            say(f"  up to {n_done} tokens", f"{n / took:.0f} tokens/s")
            last[:] = n_done, time.monotonic()

    return progress


def read(n_tokens, model, builder, client, options):
    """Prefill, questions and decoding; the Recorder of the beginning."""
    context = builder.build(n_tokens, 4, 3, 11)
    recorder, right = Recorder(), {"passkey": [0, 0], "verse": [0, 0]}
    options = dict(options, max_tokens=n_tokens + 4096)
    with kvasir.attach(model, client, **options) as kv:
        with kv.cache() as cache:
            kv.observer = recorder
            kv.prefill(cache, context.ids[:REPLAYED])
            kv.observer, before = None, in_worker(cache.stats())
            _, took = timed(lambda: kv.prefill(cache, context.ids, rates_of(n_tokens)))
            stats, n = cache.stats(), n_tokens - REPLAYED
            say(f"{n_tokens} tokens, prefill", f"{took:.1f} s for {n}: {n / took:.0f} tokens/s")
            say("of it in the worker", f"{in_worker(stats) - before:.1f} s")
            say("waiting for the store", f"{stats['ns_put_wait'] / 1e9:.1f} s")
            say("steps on the GPU", f"{stats['steps_device']} of {stats['steps']}")
            say("picks resident", f"{stats['hits'] / max(1, stats['picks']):.3f}")
            dense = n_tokens * kv.geometry.n_layers * kv.geometry.row_bytes
            held = f"{stats['bytes_device'] / 1e6:.0f} MB, dense {dense / 1e6:.0f} MB"
            say("GPU memory of the sequence", held)
            cache.flush(300)
        token_ms, worker_ms, layers = ask(kv, model, context, right)
    say("answers", f"{rates(right)}; picked in {layers:.1f} layers")
    say("a decoded token, median", f"{token_ms:.1f} ms, {worker_ms:.2f} in the worker")
    return recorder


def options_of(setting, model, ids, folder):
    """Worker's options; the index is calibrated over ids."""
    selector, dims, k = setting.split(":")
    recent, name = N_RECENT[selector], hf_model.model_id(model)
    projection = folder / f"{selector}-{dims}.projection"
    fit(collect(model, ids), selector, int(dims), recent, name).write(projection)
    counts = dict(n_sink=N_SINK, n_recent=recent, k=int(k), eps=EPS[selector])
    return dict(selector=selector, index="compressed", projection=projection, **counts)


def compare(recorder, model, options):
    """Whether the CPU backend finds the same."""
    geometry, name = hf_model.geometry_of(model)[0], hf_model.model_id(model)
    worst, shared = replay(recorder, geometry, name, options)
    say("the CPU backend, same inputs: outputs", f"within {worst:.2g} of the largest")
    say("the CPU backend, same inputs: picks", f"{shared:.5f} in common")
    return worst < 0.02 and shared > 0.99


def main():
    """Runs it."""
    args, alike = parse(), True
    args.state.mkdir(parents=True, exist_ok=True)
    model, tokenizer = stock.load(None, args.gguf, args.state, lambda text: None)
    model = model.to("cuda")
    builder = Builder(tokenizer, load_verses(args.text, None))
    with torch.inference_mode(), kvasir.Client(args.server) as client:
        if not args.skip_ceiling:
            say("the stock model within its window", rates(ceiling(model, builder)))
        ids = builder.build(CALIBRATION_TOKENS, 1, 0, 3, start=9000).ids
        options = options_of(args.setting, model, ids, args.state)
        say("selector, columns a head, picks", args.setting)
        gpu = dict(options, backend="cuda")
        recorders = [read(n, model, builder, client, gpu) for n in args.tokens]
        if recorders and not args.skip_cpu:
            alike = compare(recorders[0], model, options)
    return 0 if alike else 1


if __name__ == "__main__":
    raise SystemExit(main())
