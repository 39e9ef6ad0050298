"""Right answers: all tokens of an answer the most likely ones, each after the right ones before it,
which is what greedy decoding answers right."""

import argparse
import json
import math

import numpy as np
import torch

from . import data, haystack, weights
from .model import Config, Model


def wilson(n_right, n, z=1.96):
    """(low, high) of a share: Wilson's interval at 95 %."""
    share, f = n_right / n, 1 + z * z / n
    mid = (share + z * z / (2 * n)) / f
    half = z / f * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, mid - half), min(1.0, mid + half)


@torch.no_grad()
def batches(model, device, rng, kind, n_tokens, n_questions, step_tokens=1 << 18):
    """(right, asked): n_questions contexts of n_tokens, one question of a kind each."""
    n_body = n_tokens // data.CHUNK - data.tail_chunks([kind])
    n_keys, n_links = data.beside(kind, n_body)
    n_right = done = 0
    while done < n_questions:
        n_rows = min(n_questions - done, max(1, step_tokens // n_tokens))
        tokens, labels, _, answers = data.batch(rng, n_rows, n_body, [kind], n_keys, n_links)
        tokens, labels = torch.from_numpy(tokens).to(device), torch.from_numpy(labels).to(device)
        logits = model(tokens, labels.shape[1])
        n_right += int(data.right(logits, labels, answers)[0][1].sum())
        done += n_rows
    return n_right, done


def load(path, device):
    """The Model of a safetensors file that train wrote."""
    tensors, metadata = weights.load(path)
    model = Model(Config(**json.loads(metadata["config"])))
    model.load_state_dict(tensors)
    return model.to(device).eval()


def parser():
    """The command line."""
    p = argparse.ArgumentParser(prog="kvasir.gca.evaluate", description="Right answers by length.")
    p.add_argument("--weights", required=True, help="model.safetensors")
    p.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384])
    p.add_argument("--kinds", nargs="+", choices=data.KINDS, default=list(data.KINDS))
    p.add_argument("--longer", type=int, default=16384, help="share fillers above so many tokens")
    p.add_argument("--questions", type=int, default=300, help="of each kind and length")
    p.add_argument("--seed", type=int, default=11)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return p


def main(args):
    """Prints a markdown table: share of right answers and its 95 % interval."""
    model = load(args.weights, args.device)
    print("| task | " + " | ".join(str(n) for n in args.tokens) + " |")
    print("|---|" + "---|" * len(args.tokens))
    for kind in args.kinds:
        cells = []
        for tokens in args.tokens:
            rng = np.random.default_rng([args.seed, tokens])
            ask = batches if tokens <= args.longer else haystack.questions
            n_right, n = ask(model, args.device, rng, kind, tokens, args.questions)
            low, high = wilson(n_right, n)
            cells.append(f"{100 * n_right / n:.1f} ({100 * low:.1f} to {100 * high:.1f})")
        print(f"| {kind} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(parser().parse_args())
