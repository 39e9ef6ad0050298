"""The report: plain text for people, the same numbers as JSON."""


def size(n):
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return str(n)


def percent(part, whole):
    """A share, or a dash where there is nothing."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _answers(r):
    lines = ["Answers (greedy, token by token; a verse counts up to its first wrong token)"]
    for a in r["answers"]:
        mark = "right" if a["right"] else "wrong"
        if a["kind"] == "verse":
            mark = f"{a['n_right']} of {a['n_asked']} tokens"
        layers = f"picked in {a['layers_with_it']} of {a['layers']} layers"
        lines.append(
            f"  {a['kind']:<8}{a['name']:<9}depth {100 * a['depth']:3.0f} %  {mark:<16}{layers}"
        )
        lines.append(f"      asked {a['asked']!r}, expected {a['expected']!r}")
        lines.append(f"      answered {a['answered']!r}")
    keys = [a for a in r["answers"] if a["kind"] == "passkey"]
    verses = [a for a in r["answers"] if a["kind"] == "verse"]
    tokens = percent(sum(a["n_right"] for a in verses), sum(a["n_asked"] for a in verses))
    lines.append(
        f"  in all: passkeys {sum(a['right'] for a in keys)} of {len(keys)}, verses {tokens} of "
        "their tokens"
    )
    return lines


def _ceiling(r):
    c = r["ceiling"]
    note = ", from an earlier run" if c["cached"] else ""
    lines = [
        "The model's own rate with stock full attention within its window, like lines hidden, "
        f"like questions{note}"
    ]
    for n, row in c["rates"].items():
        (key, keys), (verse, verses) = row["passkey"], row["verse"]
        lines.append(
            f"  {int(n):>6,} tokens: passkeys {key} of {keys}, verses {percent(verse, verses)} of "
            "their tokens"
        )
    return lines


def _memory(r):
    m = r["memory"]
    lines = [
        "Memory",
        f"  context: {r['tokens']:,} tokens; full KV {size(m['full_kv'])}",
        f"  in the worker, at most: {size(m['worker'])}, {percent(m['worker'], m['full_kv'])} of "
        f"it (index {size(m['index'])}, residency {size(m['residency'])}, "
        f"sink and recent {size(m['window'])})",
    ]
    for t in r["tiers"]:
        lines.append(
            f"  in cachesvc, {t['name']}: {size(t['used_bytes'])} of {size(t['capacity_bytes'])}, "
            f"{t['values']:,} values"
        )
    return lines


def _traffic(r):
    lines = ["Traffic and time per token"]
    for name in ("prefill", "first", "decode"):
        t = r[name]
        n, rows = t["tokens"], t["hits"] + t["misses"]
        if not n:
            continue
        lines.append(
            f"  {name:<8}{1000 * t['seconds'] / n:8.2f} ms/token; fetched "
            f"{t['misses'] / n:,.0f} rows, {size(t['bytes_fetched'] / n)} a token"
        )
        lines.append(
            f"          of the rows picked: resident {percent(t['hits'], rows)}, dram "
            f"{percent(t['rows_dram'], rows)}, lmdb {percent(t['rows_lmdb'], rows)}; select "
            f"{t['select_ms']:.2f}, wait {t['wait_ms']:.2f}, attend {t['attend_ms']:.2f} ms/token"
        )
    lines.append("  (first: a question's first token, whose residency is empty)")
    return lines


def _difference(d):
    return (
        f"top-1 {percent(d['top1'], 1)}, KL {d['kl']:.4f}, attention output off by "
        f"{percent(d['attention_error'], 1)} (worst layer "
        f"{percent(d['attention_error_worst_layer'], 1)}) over {d['positions']} positions"
    )


def _agreement(r):
    lines = ["Agreement, teacher-forced (errors of earlier layers included)"]
    for first, d in r["inside"].items():
        end = int(first) + d["positions"]
        note = ", all of them attended" if d["full"] else ""
        lines.append(f"  (a) stock full attention, tokens {int(first):,} to {end:,}{note}:")
        lines.append(f"      {_difference(d)}")
    b = r["beyond"]
    if b is None:
        lines.append(f"  (b) exact selection: not measured, {r['beyond_note']}")
        return lines
    note = " (measured when the prefix was read)" if r["beyond_note"] else ""
    lines.append(f"  (b) exact selection, from {r['tokens']:,} tokens on{note}:")
    lines.append(f"      {_difference(b)}")
    if b["recall"] is not None:
        lines.append(f"      picks: {percent(b['recall'], 1)} of the exact ones")
    return lines


def _reuse(r):
    u = r["reuse"]
    if not u["n_reused"]:
        return []
    saved = (
        f" instead of the {u['first_seconds']:.0f} s that reading them took"
        if u["first_seconds"]
        else ""
    )
    return [
        "Prefix reuse",
        f"  {u['n_reused']:,} of {r['tokens']:,} tokens came from the store in {u['seconds']:.1f} s"
        f"{saved}",
    ]


def text(r):
    """The whole report."""
    head = (
        f"Kvasir quickstart: {r['model']}, window {r['window']:,}; {r['tokens']:,} tokens\n"
        f"{r['selector']}, {r['index']} index of {r['index_bytes']} B/token a layer (keys and "
        f"values have {r['row_bytes']}); {r['seconds']:.0f} s in all"
    )
    parts = [[head], _answers(r), _ceiling(r), _memory(r), _traffic(r), _reuse(r), _agreement(r)]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"
