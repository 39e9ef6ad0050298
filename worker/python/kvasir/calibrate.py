"""python -m kvasir.calibrate: the projection of a compressed index, from a model and a text.

ESA (form shared): one matrix over the concatenated heads, the group-summed query rotated at
far_position, the distance at which ESA attends to far keys. TokenSelect (per_head): one matrix per
kv head, queries rotated at n_recent. Keys are always raw.
"""

import argparse

import numpy as np
import torch

from . import activations, closed_form, hf_model
from .progress import Bar
from .projection import Projection

FORMS = {"esa": "shared", "tokenselect": "per_head"}
DEFAULT_ROPE = {"esa": 4096, "tokenselect": 512}  # kvw_opts: far_position, n_recent


def fit(acts, selector, dims, rope, model_id, form=None, top=1 / 32, notes=None, progress=None):
    """A Projection from Activations. rope: a position, or "raw" for queries before RoPE."""
    g, form = acts.geometry, form or FORMS[selector]
    width = g.n_kv_heads * g.head_dim if form == "shared" else g.head_dim
    if not 1 <= dims <= width:
        raise ValueError(f"dims must be 1 to {width} for form {form}")
    freq = hf_model.inv_freq(g.rope, g.head_dim)
    a, b = [], []
    for layer in range(g.n_layers):
        q = acts.q[layer].double()
        if rope != "raw":
            q = hf_model.rotate(q, rope, freq)
        pair = closed_form.solve_layer(q, acts.k[layer].double(), form, dims, top=top)
        a.append(pair[0].float().numpy())
        b.append(pair[1].float().numpy())
        if progress is not None:
            progress(layer + 1, g.n_layers)
    return Projection(
        selector,
        model_id,
        g.n_kv_heads,
        g.head_dim,
        form,
        rope,
        np.stack(a),
        np.stack(b),
        {
            "tool": "kvasir.calibrate",
            "tokens": acts.n_tokens,
            "top": round(top, 6) if top else "none",
            **(notes or {}),
        },
    )


def load_model(path, dtype):
    """(model, tokenizer) of a local folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    return model, AutoTokenizer.from_pretrained(path)


def token_slice(tokenizer, text_path, n_tokens, skip_chars=0):
    """n_tokens ids of a text file from skip_chars on; fewer where the text ends."""
    with open(text_path, encoding="utf-8", errors="replace") as f:
        text = f.read()[skip_chars:]
    ids = []
    while text and len(ids) < n_tokens:
        cut = text.find("\n", 8 * (n_tokens - len(ids))) + 1 or len(text)
        ids += tokenizer(text[:cut], verbose=False).input_ids
        text = text[cut:]
    if not ids:
        raise ValueError(f"{text_path} has no text after {skip_chars} characters")
    return ids[:n_tokens]


def parser():
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m kvasir.calibrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--model", required=True, help="a folder that transformers can load")
    p.add_argument("--text", required=True, help="a text like those to be served, UTF-8")
    p.add_argument("--out", required=True, help="the artefact")
    p.add_argument("--selector", choices=sorted(FORMS), default="esa")
    p.add_argument("--form", choices=("shared", "per_head"), help="default: the selector's")
    p.add_argument(
        "--dims", type=int, required=True, help="columns per head; a worker may use fewer"
    )
    p.add_argument(
        "--rope",
        help="position of the queries: far_position (ESA, default 4096), "
        "n_recent (TokenSelect, 512), or raw",
    )
    p.add_argument("--tokens", type=int, default=49152)
    p.add_argument("--skip-chars", type=int, default=0, help="where in the text to begin")
    p.add_argument("--window", type=int, default=4096, help="tokens that the model reads at a time")
    p.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    p.add_argument(
        "--top",
        type=float,
        default=1 / 32,
        help="keys count by how often they are in this share of the best; 0: all alike",
    )
    p.add_argument(
        "--model-id", help="name in the artefact; default: that of the model, as attach uses it"
    )
    p.add_argument("--threads", type=int, default=0)
    return p


def main(argv=None):
    """Runs the tool; returns the exit status."""
    args = parser().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    rope = args.rope if args.rope == "raw" else int(args.rope or DEFAULT_ROPE[args.selector])
    model, tokenizer = load_model(args.model, args.dtype)
    ids = token_slice(tokenizer, args.text, args.tokens, args.skip_chars)
    bar = Bar("reading", len(ids), "tokens")
    acts = activations.collect(model, ids, args.window, progress=bar)
    bar.close()
    bar = Bar("solving", acts.geometry.n_layers, "layers")
    projection = fit(
        acts,
        args.selector,
        args.dims,
        rope,
        args.model_id or hf_model.model_id(model),
        args.form,
        args.top or None,
        progress=bar,
    )
    bar.close()
    projection.write(args.out)
    print(
        f"{args.out}: {args.selector}, {projection.form}, {args.dims} dims, rope {rope}, "
        f"from {len(ids)} tokens"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
