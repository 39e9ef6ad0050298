"""
python -m kvasir.gca.train --out DIR --seconds 500: one piece of training; goes on where DIR's
checkpoint stopped, or begins.

A checkpoint is three safetensors files (weights and the two moments of AdamW), each with the whole
state in its metadata; log.jsonl has one line a round of steps. Batches, noise and learning rate are
functions of the seed and the step, and rounds are whole, so that a run in pieces equals one in one
piece bit for bit, where the device's own arithmetic repeats. Contexts grow: a longer body joins
when the longest one's single-hop questions are answered.
"""

import argparse
import concurrent.futures
import json
import math
import os
import time

import numpy as np
import torch
import torch.nn.functional as F

from . import data, evaluate, weights
from .model import Config, Model

BODIES = (8, 16, 32, 64, 128, 240)  # chunks; the last with its longest tail is below 16,384 tokens
FILES = {"model": "model.safetensors", "m": "moment1.safetensors", "v": "moment2.safetensors"}


class Trainer:
    """The state of a run and its steps. args: see parser()."""

    def __init__(self, args):
        self.args, self.device = args, torch.device(args.device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # the mask is a broadcast, which it refuses
        self.config = Config(
            hidden=args.hidden,
            heads=args.heads,
            mlp=args.mlp,
            lower=args.lower,
            encoder=args.encoder,
            upper=args.upper,
            groups=args.groups,
        )
        torch.manual_seed(args.seed)
        self.model = Model(self.config).to(self.device)
        self.names, self.params = zip(*self.model.named_parameters())
        decay = [p for p in self.params if p.dim() > 1]
        rest = [p for p in self.params if p.dim() <= 1]
        groups = [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=args.lr, betas=(0.9, 0.98), fused=self.device.type == "cuda"
        )
        self.noise = torch.Generator(self.device)
        self.step, self.level, self.seconds = 0, 0, 0.0
        self.pool = concurrent.futures.ThreadPoolExecutor(1)
        self.coming = None

    def settings(self):
        """What has to be equal for a run to go on, as text."""
        names = ("hidden", "heads", "mlp", "lower", "encoder", "upper", "groups", "seed", "lr")
        names += ("guide", "tokens", "round")
        return {name: str(getattr(self.args, name)) for name in names}

    def learning_rate(self):
        """Up in the first steps, then constant, then down to a twentieth by a line."""
        done, (first, last) = self.step + 1, self.args.cool
        cooled = min(1.0, max(0.0, (done - first) / (last - first)))
        return self.args.lr * min(done / self.args.warmup, 1.0 - 0.95 * cooled)

    def gumbel(self, shape):
        """Gumbel(0, 1) noise: which chunks a training step retrieves is a draw by their scores."""
        x = torch.empty(shape, device=self.device).exponential_(generator=self.noise)
        return -x.clamp_(min=1e-20).log_()

    def _make_batch(self, step, level):
        bodies = self.args.bodies[: level + 1]
        return data.training_batch(self.args.seed, step, bodies, self.args.tokens)

    def _next_batch(self):
        """This step's batch; the next one is made meanwhile, but not across a round's end, where
        the level may change."""
        batch = self.coming.result() if self.coming else self._make_batch(self.step, self.level)
        self.coming = None
        if (self.step + 1) % self.args.round:
            self.coming = self.pool.submit(self._make_batch, self.step + 1, self.level)
        return batch

    def guide(self, scored, targets):
        """Cross-entropy of each group's scores against the chunk that is needed: the first hop's,
        for the last group the last hop's."""
        loss = 0.0
        for g, scores in enumerate(scored):
            hop = 1 if g + 1 == len(scored) else 0
            wanted = targets[:, 1:, hop].flatten()
            loss = loss + F.cross_entropy(scores.flatten(0, 1), wanted, ignore_index=-1)
        return loss / len(scored)

    def _one_step(self, tally):
        body, *arrays, answers = self._next_batch()
        tensors = [torch.from_numpy(a).to(self.device, non_blocking=True) for a in arrays]
        tokens, labels, targets = tensors
        self.noise.manual_seed(self.args.seed * 1_000_003 + self.step)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            scored = []
            logits = self.model(tokens, labels.shape[1], self.gumbel, scored)
        logits = logits.float()
        loss = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), ignore_index=-1)
        guide = self.guide(scored, targets)
        (loss + self.args.guide * guide).backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            tally.add(body, loss, guide, data.right(logits, labels, answers))
        self.step += 1

    def one_round(self):
        """args.round steps; the log line. The level rises when the longest contexts are learned."""
        tally, start = Tally(), time.monotonic()
        for _ in range(self.args.round):
            self._one_step(tally)
        line = tally.line()
        if not math.isfinite(line["loss"]):
            raise FloatingPointError(f"loss is {line['loss']} at step {self.step}")
        took = time.monotonic() - start
        self.seconds += took
        line = {"step": self.step, "seconds": round(self.seconds, 1), **line}
        line["steps_per_s"] = round(self.args.round / took, 2)
        top = str(self.args.bodies[self.level])
        known = line["right"].get(top, {})
        learned = all(known.get(kind, 0.0) >= 0.9 for kind in (data.PASSKEY, data.MULTIKEY))
        if learned and self.level + 1 < len(self.args.bodies):
            self.level += 1
        return line

    def save(self):
        """Writes the checkpoint into args.out."""
        state = {"step": self.step, "level": self.level, "seconds": self.seconds}
        state = {"state": json.dumps(state), "settings": json.dumps(self.settings())}
        state["config"] = json.dumps(self.config.__dict__)
        moments = [self.optimizer.state[p] for p in self.params]
        tensors = {
            "v": dict(zip(self.names, (m["exp_avg_sq"] for m in moments))),
            "m": dict(zip(self.names, (m["exp_avg"] for m in moments))),
            "model": dict(zip(self.names, self.params)),
        }
        for kind, named in tensors.items():
            weights.save(os.path.join(self.args.out, FILES[kind]), named, state)

    def load(self):
        """Goes on from the checkpoint in args.out; False where there is none."""
        paths = {kind: os.path.join(self.args.out, name) for kind, name in FILES.items()}
        if not any(os.path.exists(path) for path in paths.values()):
            return False
        read = {kind: weights.load(path) for kind, path in paths.items()}
        metadata = read["model"][1]
        if any(m != metadata for _, m in read.values()):
            raise ValueError(f"{self.args.out}: the files are of different steps")
        if json.loads(metadata["settings"]) != self.settings():
            raise ValueError(f"{self.args.out} is a run with {metadata['settings']}")
        self.model.load_state_dict(read["model"][0])
        state = json.loads(metadata["state"])
        for name, p in zip(self.names, self.params):
            count = torch.tensor(float(state["step"]), device=self._count_device())
            self.optimizer.state[p] = {
                "step": count,
                "exp_avg": read["m"][0][name].to(self.device),
                "exp_avg_sq": read["v"][0][name].to(self.device),
            }
        self.step, self.level, self.seconds = state["step"], state["level"], state["seconds"]
        return True

    def _count_device(self):
        return self.device if self.device.type == "cuda" else "cpu"


class Tally:
    """Losses and right answers of a round, added up on the device."""

    def __init__(self):
        self.losses, self.guides, self.rights = [], [], {}

    def add(self, body, loss, guide, right):
        """right: [(kind, bool per context)]."""
        self.losses.append(loss.detach())
        self.guides.append(guide.detach())
        for kind, ok in right:
            self.rights.setdefault((str(body), kind), []).append(ok.float().mean())

    def line(self):
        """{"loss", "guide", "right": {body chunks: {kind: share}}}."""
        shares = {}
        for (body, kind), oks in sorted(self.rights.items(), key=lambda e: (int(e[0][0]), e[0][1])):
            shares.setdefault(body, {})[kind] = round(torch.stack(oks).mean().item(), 4)
        losses = {"loss": self.losses, "guide": self.guides}
        means = {name: round(torch.stack(x).mean().item(), 5) for name, x in losses.items()}
        return {**means, "right": shares}


def cut_log(path, step):
    """Leaves out what a lost piece wrote after the checkpoint."""
    if not os.path.exists(path):
        return
    with open(path, encoding="utf-8") as f:
        kept = [line for line in f if json.loads(line)["step"] <= step]
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(kept)


def run(args):
    """Trains until the piece's seconds or steps are over; returns the Trainer."""
    began = time.monotonic()
    os.makedirs(args.out, exist_ok=True)
    trainer = Trainer(args)
    log_path = os.path.join(args.out, "log.jsonl")
    found = trainer.load()
    cut_log(log_path, trainer.step if found else -1)
    n = sum(p.numel() for p in trainer.params)
    print(f"{n} weights, step {trainer.step}, level {trainer.level}, {args.device}", flush=True)
    saved = time.monotonic()
    train_s = args.seconds - args.eval_seconds
    with open(log_path, "a", encoding="utf-8") as log:

        def note(line):
            text = json.dumps(line)
            print(text, flush=True)
            log.write(text + "\n")
            log.flush()

        while time.monotonic() - began < train_s and trainer.step < args.steps:
            note(trainer.one_round())
            if time.monotonic() - saved > args.save_seconds:
                trainer.save()
                saved = time.monotonic()
        trainer.save()
        left = began + args.seconds - time.monotonic()
        if args.eval_seconds > 0:
            note({"step": trainer.step, "eval": quick_eval(trainer, max(left, 1.0))})
    return trainer


def quick_eval(trainer, seconds):
    """{kind: {tokens: share of right answers}}, as many lengths as the time allows."""
    until, out = time.monotonic() + seconds, {}
    for tokens in (1024, 4096, 16384):
        for kind in data.KINDS:
            if time.monotonic() < until:
                rng = np.random.default_rng([7, tokens])
                n_right, n = evaluate.batches(
                    trainer.model, trainer.device, rng, kind, tokens, trainer.args.eval_questions
                )
                out.setdefault(kind, {})[str(tokens)] = round(n_right / n, 4)
    return out


def parser():
    """The command line."""
    p = argparse.ArgumentParser(prog="kvasir.gca.train", description=__doc__.split("\n")[1])
    p.add_argument("--out", required=True, help="folder of the checkpoint and the log")
    p.add_argument("--seconds", type=float, default=500.0, help="of this piece, start to end")
    p.add_argument("--steps", type=int, default=1 << 60, help="stop at this step of the whole run")
    p.add_argument("--groups", type=int, default=2, help="retrieval groups of the upper half")
    p.add_argument("--hidden", type=int, default=128)
    p.add_argument("--heads", type=int, default=4)
    p.add_argument("--mlp", type=int, default=256)
    p.add_argument("--lower", type=int, default=2, help="layers")
    p.add_argument("--encoder", type=int, default=1, help="layers")
    p.add_argument("--upper", type=int, default=2, help="layers")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--lr", type=float, default=1.5e-3)
    p.add_argument("--warmup", type=int, default=200, help="steps")
    p.add_argument("--cool", type=int, nargs=2, default=[13000, 19000], help="the rate's way down")
    p.add_argument("--guide", type=float, default=1.0, help="weight of the needed chunks' scores")
    p.add_argument("--tokens", type=int, default=65536, help="of a step")
    p.add_argument("--round", type=int, default=100, help="steps of a log line")
    p.add_argument("--bodies", type=int, nargs="+", default=list(BODIES), help="chunks, growing")
    p.add_argument("--save-seconds", type=float, default=60.0, help="between checkpoints")
    p.add_argument("--eval-seconds", type=float, default=20.0, help="at the end; 0: no evaluation")
    p.add_argument("--eval-questions", type=int, default=128, help="of each kind and length")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return p


if __name__ == "__main__":
    run(parser().parse_args())
