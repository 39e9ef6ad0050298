"""python -m kvasir.quality: how well a compressed index selects, on a model's own activations.

For every layer and k: recall (share of the exact top-k that the compressed index finds) and mass
(share of the softmax over all candidates that the picks hold, beside the exact picks' share), for
single queries (decode) and for chunks (prefill). The softmax is taken where the selector's own
attention has the tokens: ESA, queries at far_position and keys at 0; TokenSelect, each candidate at
the position that it has, or would have, in the renumbered list of the exact picks.
"""

import argparse
from collections import defaultdict
from copy import copy
from pathlib import Path

import numpy as np
import torch

from . import activations, calibrate, hf_model, index_model, projection
from .hf import Observer, attach
from .progress import Bar

KS = (256, 1024, 2048)
CHUNK = 512


class Context:
    """
    One context's keys [n_layers, n_tokens, n_kv_heads, d] and the queries of its last `tail`
    tokens; candidates are tokens n_sink .. n_tokens - tail.
    """

    def __init__(self, geometry, k, q_tail, n_sink):
        self.geometry, self.k, self.q_tail, self.n_sink = geometry, k, q_tail, n_sink
        self.first, self.end = n_sink, k.shape[1] - q_tail.shape[1]
        self.freq = hf_model.inv_freq(geometry.rope, geometry.head_dim).to(k.device)

    def last(self, n):
        """The same queries over the last n candidates only."""
        context = copy(self)
        context.first = self.end - n
        return context

    def candidates(self, layer):
        """Raw keys that selectors choose among."""
        return self.k[layer, self.first : self.end].float()

    def rotated(self, q, position):
        """q [m, heads, d] at one position (a number, or "raw")."""
        return q if position == "raw" else hf_model.rotate(q, position, self.freq)

    def singles(self, layer, n):
        """n queries [n, n_q_heads, d], spread over the tail."""
        tail = self.q_tail[layer]
        return tail[torch.linspace(0, len(tail) - 1, n).long()].float()

    def chunk(self, layer):
        """The last CHUNK queries."""
        return self.q_tail[layer, -CHUNK:].float()


class _Recorder(Observer):
    """Keeps the keys of a run and the queries of its tail."""

    def __init__(self, geometry, tail_from):
        self.tail_from = tail_from
        self.k = [[] for _ in range(geometry.n_layers)]
        self.q = [[] for _ in range(geometry.n_layers)]

    def on_layer(self, cache, layer, q, k, v, out):
        """Keeps k, and q where the tail has begun."""
        self.k[layer].append(k.clone())
        if cache.n_tokens + len(q) > self.tail_from:
            self.q[layer].append(q[max(0, self.tail_from - cache.n_tokens) :].clone())


def run_sparse(model, ids, tail, n_sink, progress, client=None, options=None):
    """
    A Context of ids run through Kvasir: TokenSelect over exact keys, or as options of attach say;
    without a client all rows are resident.
    """
    options = options or {"selector": "tokenselect", "index": "exact"}
    with attach(model, client, **options) as attachment:
        recorder = _Recorder(attachment.geometry, len(ids) - tail)
        attachment.observer = recorder
        with attachment.cache() as cache:
            attachment.prefill(cache, ids, progress)
        return Context(
            attachment.geometry,
            torch.stack([torch.cat(x) for x in recorder.k]),
            torch.stack([torch.cat(x) for x in recorder.q]),
            n_sink,
        )


def run_windows(model, ids, tail, n_sink, progress, window=4096):
    """A Context of ids run in windows with full attention: needs no worker."""
    acts = activations.collect(model, ids, window, 1, 1, progress)
    return Context(acts.geometry, acts.k, acts.q[:, -tail:].clone(), n_sink)


def esa_mass(context, q, k, far):
    """Softmax [m, n] over candidates, mean of heads, where ESA's far attention has them."""
    g = context.geometry
    logits = index_model.vote_logits(context.rotated(q, far), k) * g.attention_scale
    return logits.softmax(-1).mean(1)


def tokenselect_mass(context, q, k, exact_picks, n_sink, n_recent):
    """The same [m, n] at renumbered positions; exact_picks [m, k_picks]."""
    g, d = context.geometry, q.shape[-1]
    half = torch.view_as_complex(torch.stack((k[..., : d // 2], k[..., d // 2 :]), -1).contiguous())
    n_picks, out = exact_picks.shape[1], []
    table = torch.polar(
        torch.ones(1, device=k.device),
        (
            torch.arange(n_sink + n_picks + 1, device=k.device)[:, None].double() * context.freq
        ).float(),
    )
    queries = hf_model.rotate(q, n_sink + n_picks + n_recent - 1, context.freq)
    for i in range(len(q)):
        taken = torch.zeros(len(k), dtype=torch.int64, device=k.device)
        taken[exact_picks[i]] = 1
        positions = n_sink + taken.cumsum(0) - taken
        turned = half * table[positions][:, None]
        keys = torch.cat((turned.real, turned.imag), -1)
        logits = index_model.vote_logits(queries[i : i + 1], keys) * g.attention_scale
        out.append(logits.softmax(-1).mean(1)[0])
    return torch.stack(out)


def recall_of(picks, exact_picks, n):
    """Share of exact_picks [m, k] that picks [m, k] hold, mean over m."""
    mark = torch.zeros(len(picks), n, device=picks.device).scatter_(1, exact_picks, 1.0)
    return float(mark.gather(1, picks).mean())


class Table:
    """Collects (recall, mass, exact mass) per row name, k and layer."""

    def __init__(self):
        self.cells = defaultdict(list)

    def add(self, row, k, recall, mass, exact_mass):
        """One layer's numbers, layers in order."""
        self.cells[row, k].append((recall, mass, exact_mass))

    def rows(self):
        """Row names in the order of their first appearance."""
        return list(dict.fromkeys(row for row, _ in self.cells))

    def cell(self, row, k):
        """(mean recall, worst, mass of exact's, worst layer's, exact mass)."""
        a = np.array(self.cells[row, k])
        share = a[:, 1] / np.maximum(a[:, 2], 1e-12)
        return (
            a[:, 0].mean(),
            a[:, 0].min(),
            a[:, 1].mean() / a[:, 2].mean(),
            share.min(),
            a[:, 2].mean(),
        )


def _score_row(table, row, picks_of, exact, mass_of):
    """picks_of(k) and exact (scores [m, n]) -> a row of the table."""
    for k in KS:
        exact_picks, picks = exact.topk(k, 1).indices, picks_of(k)
        p = mass_of(exact_picks)
        table.add(
            row,
            k,
            recall_of(picks, exact_picks, exact.shape[1]),
            float(p.gather(1, picks).sum(1).mean()),
            float(p.gather(1, exact_picks).sum(1).mean()),
        )


def _columns(proj, layer, dims, device="cpu"):
    """A, B [heads, d_in, dims] of a layer as tensors."""
    return tuple(torch.tensor(x[layer, ..., :dims], device=device) for x in (proj.a, proj.b))


def esa_layer(table, context, layer, proj, indexes, far, n_singles):
    """Rows of ESA in one layer, for single queries and one chunk; indexes: (dims, form)."""
    k = context.candidates(layer)
    singles, chunk = context.singles(layer, n_singles), context.chunk(layer)
    p_single = esa_mass(context, singles, k, far)
    p_chunk = esa_mass(context, chunk[::64], k, far).mean(0, keepdim=True)
    for kind, q, p in (("decode", singles, p_single), ("chunk", chunk, p_chunk)):
        q = context.rotated(q, proj.rope)
        whole = index_model.esa_scores(q, k)
        exact = whole if kind == "decode" else index_model.esa_chunk(whole)[None]
        for dims, form in indexes:
            scores = index_model.esa_scores(q, k, *_columns(proj, layer, dims, k.device), form)
            scores = scores if kind == "decode" else index_model.esa_chunk(scores)[None]
            name = f"d'={dims}" if form == "int8" else f"d'={dims} {form}"
            row = (kind, name, index_model.row_bytes(1, dims, form))
            _score_row(
                table, row, lambda n, s=scores: s.topk(n, 1).indices, exact, lambda _, p=p: p
            )


def tokenselect_layer(table, context, layer, proj, dims_list, pairs, n_recent, n_singles):
    """Rows of TokenSelect: compressed at dims_list, re-ranked at pairs (scan, finer)."""
    k, heads = context.candidates(layer), context.geometry.n_kv_heads
    singles, chunk = context.singles(layer, n_singles), context.chunk(layer)
    rotated = torch.stack([context.rotated(q[None], n_recent + i)[0] for i, q in enumerate(chunk)])
    inputs = (
        ("decode", singles, context.rotated(singles, n_recent)),
        ("chunk", chunk[::128], rotated.mean(0, keepdim=True)),
    )
    for kind, real, q in inputs:
        exact = index_model.soft_vote(index_model.vote_logits(q, k))
        masses = {}

        def mass_of(picks, real=real, masses=masses):
            n = picks.shape[1]
            if n not in masses:
                each = picks.expand(len(real), -1)
                p = tokenselect_mass(context, real, k, each, context.n_sink, n_recent)
                masses[n] = p if len(picks) == len(real) else p.mean(0, keepdim=True)
            return masses[n]

        logits = {
            n: index_model.vote_logits(q, k, *_columns(proj, layer, n, k.device))
            for n in {*dims_list, *(n for pair in pairs for n in pair)}
        }
        for dims in dims_list:
            votes = index_model.soft_vote(logits[dims])
            row = (kind, f"{dims}", index_model.row_bytes(heads, dims))
            _score_row(table, row, lambda n, v=votes: v.topk(n, 1).indices, exact, mass_of)
        for scan, fine in pairs:
            votes = index_model.soft_vote(logits[scan])
            row = (
                kind,
                f"{scan} then {fine}",
                index_model.row_bytes(heads, scan + fine) + 2 * heads,
            )
            _score_row(
                table,
                row,
                lambda n, v=votes, f=fine: index_model.rerank(v, logits[f], n),
                exact,
                mass_of,
            )


def markdown(title, table, exact_bytes):
    """The table as markdown."""
    lines = [
        f"**{title}** (exact keys: {exact_bytes} B/token; mean of layers / worst layer)",
        "",
        "| queries | index | B/token | " + " | ".join(f"recall@{k} | mass@{k}" for k in KS) + " |",
        "|---|---|---|" + "---|" * (2 * len(KS)),
    ]
    for row in table.rows():
        cells = []
        for k in KS:
            recall, worst, mass, worst_mass, _ = table.cell(row, k)
            cells += [f"{recall:.3f} / {worst:.3f}", f"{mass:.3f} / {worst_mass:.3f}"]
        lines.append(f"| {row[0]} | {row[1]} | {row[2]} | " + " | ".join(cells) + " |")
    kinds = dict.fromkeys(row[0] for row in table.rows())
    for kind in kinds:
        first = next(row for row in table.rows() if row[0] == kind)
        shares = ", ".join(f"{table.cell(first, k)[4]:.3f} at k={k}" for k in KS)
        lines.append(f"\nThe exact picks of {kind} queries hold {shares} of the softmax.")
    return "\n".join(lines)


def per_layer(title, table, layers):
    """Every layer's recall and mass beside exact's; one table for each kind of query and k."""
    lines = []
    for kind in dict.fromkeys(row[0] for row in table.rows()):
        rows = [row for row in table.rows() if row[0] == kind]
        for k in KS:
            lines += [f"**{title}; {kind} queries, k = {k}: recall / mass**", ""]
            lines.append("| layer | " + " | ".join(f"{r[1]} ({r[2]} B)" for r in rows) + " |")
            lines.append("|---|" + "---|" * len(rows))
            for i, layer in enumerate(layers):
                cells = [table.cells[row, k][i] for row in rows]
                text = (f"{r:.3f} / {mass / max(own, 1e-12):.3f}" for r, mass, own in cells)
                lines.append(f"| {layer} | " + " | ".join(text) + " |")
            lines.append("")
    return "\n".join(lines)


def parser():
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m kvasir.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--model", required=True)
    p.add_argument("--text", required=True)
    p.add_argument(
        "--length",
        type=int,
        nargs="+",
        default=[32768],
        help="candidates, tokens; the text is read once, and the shorter ones are its end",
    )
    p.add_argument("--skip-chars", type=int, default=0)
    p.add_argument("--esa", help="a projection of form shared")
    p.add_argument("--tokenselect", help="a projection of form per_head")
    p.add_argument(
        "--source",
        choices=("kvasir", "esa-cuda", "windows"),
        default="kvasir",
        help="run the text through Kvasir (TokenSelect over exact keys on the CPU; or ESA, k = "
        "2,048, with the first of --dims, on a GPU, where all is measured, too), or in windows "
        "with full attention",
    )
    p.add_argument("--server", help="of esa-cuda: the rows' cachesvc, a URI")
    p.add_argument("--tail", type=int, default=1024, help="last tokens, whose queries are used")
    p.add_argument("--sink", type=int, default=128)
    p.add_argument("--recent", type=int, default=512, help="TokenSelect's n_recent")
    p.add_argument("--far", type=int, default=4096, help="ESA's far_position")
    p.add_argument("--dims", type=int, nargs="+", default=[6, 14, 22, 30, 46, 62, 94])
    p.add_argument(
        "--forms", nargs="+", default=["int8"], choices=sorted(index_model.FORMS), help="of --dims"
    )
    p.add_argument("--per-head-dims", type=int, nargs="+", default=[16, 24, 32, 48])
    p.add_argument("--rerank", type=int, nargs="*", default=[16, 48], help="pairs: scan, finer")
    p.add_argument("--queries", type=int, default=24)
    p.add_argument("--layers", type=int, nargs="*", help="default: all")
    p.add_argument("--per-layer", metavar="FILE", help="write every layer's numbers there, too")
    p.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    p.add_argument("--threads", type=int, default=0)
    return p


def _context(args):
    model, tokenizer = calibrate.load_model(args.model, args.dtype)
    n = args.sink + max(args.length) + args.tail
    ids = calibrate.token_slice(tokenizer, args.text, n, args.skip_chars)
    if len(ids) < n:
        raise SystemExit(f"the text has {len(ids)} tokens, {n} are needed")
    bar = Bar("reading", n, "tokens")
    run, how = run_windows if args.source == "windows" else run_sparse, ()
    if args.source == "esa-cuda":
        options = dict(selector="esa", backend="cuda", index="compressed", n_sink=args.sink)
        options |= dict(projection=args.esa, index_dims=args.dims[0], k=KS[-1], eps=1)
        how = (args.server, dict(options, n_recent=args.far, max_tokens=n))
        model = model.to("cuda")
    context = run(model, torch.tensor(ids), args.tail, args.sink, bar, *how)
    bar.close()
    return context


def measure(context, args, esa, votes):
    """(table of ESA, table of TokenSelect) of a context; a projection may be None."""
    tables, layers = (Table(), Table()), args.layers or range(context.geometry.n_layers)
    pairs = list(zip(args.rerank[::2], args.rerank[1::2]))
    n_votes = max(1, args.queries // 2)
    bar = Bar("measuring", len(layers), "layers")
    for done, layer in enumerate(layers):
        if esa is not None:
            indexes = [(n, form) for n in args.dims if n <= esa.dims for form in args.forms]
            esa_layer(tables[0], context, layer, esa, indexes, args.far, args.queries)
        if votes is not None:
            dims = [n for n in args.per_head_dims if n <= votes.dims]
            of = (context, layer, votes, dims, pairs, args.recent, n_votes)
            tokenselect_layer(tables[1], *of)
        bar(done + 1, len(layers))
    bar.close()
    return tables


def report(context, args, tables):
    """Prints the tables; returns the lines of every layer."""
    g, layers = context.geometry, args.layers or range(context.geometry.n_layers)
    how = "read in windows of 4,096" if args.source == "windows" else "read through Kvasir"
    print(
        f"{context.end - context.first} candidates, {how}; {args.queries} single queries and one "
        f"chunk of {CHUNK} per layer, {len(layers)} layers.\n"
    )
    titles = (f"ESA, far_position {args.far}", f"TokenSelect, n_recent {args.recent}")
    made = [pair for pair in zip(titles, tables) if pair[1].cells]
    print("\n\n".join(markdown(title, table, g.row_bytes // 2) for title, table in made) + "\n")
    return "\n".join(per_layer(title, table, layers) for title, table in made)


def main(argv=None):
    """Runs the tool; returns the exit status."""
    args = parser().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    esa = projection.read(args.esa) if args.esa else None
    votes = projection.read(args.tokenselect) if args.tokenselect else None
    if esa is None and votes is None:
        raise SystemExit("give --esa, --tokenselect or both")
    if args.source == "esa-cuda" and not args.esa:
        raise SystemExit("--source esa-cuda reads with --esa")
    whole, every = _context(args), []
    with torch.inference_mode():
        for n in args.length:
            context = whole.last(n)
            every.append(report(context, args, measure(context, args, esa, votes)))
    if args.per_layer:
        Path(args.per_layer).write_text("\n".join(every) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
