"""The GCA decoder against plain loops, its data, its training pieces: tiny sizes, one thread."""

import json
import math
import os
import tempfile
import unittest

import need

need.modules("numpy", "torch")
import numpy as np
import torch

from kvasir.gca import data, evaluate, haystack, train, weights
from kvasir.gca.model import Config, Memory, Model

torch.set_num_threads(1)
TINY = dict(vocab=64, hidden=16, heads=2, mlp=32, chunk=8, window=16, topk=2, taps=2)


def norm(x, weight):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight


def mlp(x, p):
    y = torch.nn.functional.gelu(norm(x, p.norm.weight) @ p.up.weight.T, approximate="tanh")
    return x + y @ p.down.weight.T


def window_rows(x, p, c):
    """One row after another, each over the rows of its window."""
    qkv = (norm(x, p.norm.weight) @ p.qkv.weight.T).view(len(x), 3, c.heads, -1)
    out = torch.empty(len(x), c.heads, qkv.shape[-1], dtype=x.dtype)
    for i in range(len(x)):
        first = max(0, i - c.window + 1)
        for h in range(c.heads):
            logits = qkv[first : i + 1, 1, h] @ qkv[i, 0, h] / math.sqrt(qkv.shape[-1])
            back = i - torch.arange(first, i + 1)
            share = torch.softmax(logits - 2.0 ** (-8.0 * (h + 1) / c.heads) * back, 0)
            out[i, h] = share @ qkv[first : i + 1, 2, h]
    return x + out.flatten(1) @ p.out.weight.T


def encode_chunk(e, m, c):
    """Rows of a chunk -> (landmark, K, V) without the landmark's row."""
    s, half = c.chunk, c.hidden // c.heads // 2
    angle = torch.arange(s)[:, None] * 10000.0 ** (-torch.arange(half) / half)
    turn = torch.polar(torch.ones(s, half, dtype=torch.float64), angle.double())
    for p in m.encoder:
        qkv = (norm(e, p.norm.weight) @ p.qkv.weight.T).view(s, 3, c.heads, 2, half)
        out = torch.empty(s, c.heads, 2 * half, dtype=e.dtype)
        for h in range(c.heads):
            pairs = torch.complex(qkv[:, :2, h, 0], qkv[:, :2, h, 1]) * turn[:, None]
            q, k = torch.view_as_real(pairs).flatten(2).unbind(1)
            share = torch.softmax(q @ k.T / math.sqrt(2 * half), -1)
            out[:, h] = share @ qkv[:, 2, h].flatten(1)
        e = mlp(e + out.flatten(1) @ p.out.weight.T, p.mlp)
    e = norm(e, m.encoder_norm.weight)
    split = (s - 1, c.heads, 2 * half)
    return e[-1], (e[:-1] @ m.key.weight.T).view(split), (e[1:] @ m.value.weight.T).view(split)


def cross_row(q, chosen, w, chunks, c):
    """q [H, d]: the weighted sum of one softmax a chunk, each with 1 in the denominator."""
    out = torch.zeros_like(q)
    for i, weight in zip(chosen, w):
        _, k, v = chunks[i]
        for h in range(c.heads):
            e = torch.exp(k[:, h] @ q[h] / math.sqrt(q.shape[1]))
            out[h] += weight * (e @ v[:, h]) / (1 + e.sum())
    return out


def reference(m, tokens, n_tail):
    """Logits [n_tail * chunk, vocab] of one context in float64, by loops over rows and chunks."""
    c, s = m.c, m.c.chunk
    e = m.embed.weight[tokens.flatten()]
    x = e.clone()
    for j in range(c.taps):
        x[j + 1 :] += m.taps[j] * e[: len(e) - j - 1]
    for p in m.lower:
        x = mlp(window_rows(x, p.attention, c), p.mlp)
    chunks = [encode_chunk(x[i : i + s], m, c) for i in range(0, len(x), s)]
    first = len(tokens) - n_tail
    x = x[first * s :]
    for g in range(c.groups):
        retrieved = {}
        for u in range(1, n_tail):
            t = first + u - 1
            query = norm(x[u * s - 1], m.query_norms[g].weight)
            scores = [(float(query @ chunks[i][0]) / math.sqrt(c.hidden), i) for i in range(t)]
            best = sorted(scores, reverse=True)[: c.topk]
            w = torch.softmax(torch.tensor([b[0] for b in best], dtype=torch.float64), 0)
            retrieved[u] = ([b[1] for b in best], w)
        size = c.upper // c.groups
        for p in m.upper[g * size : (g + 1) * size]:
            x = window_rows(x, p.attention, c)
            q = (norm(x, p.norm.weight) @ p.query.weight.T).view(len(x), c.heads, -1)
            o = torch.zeros_like(q)
            for i in range(s, len(x)):
                o[i] = cross_row(q[i], *retrieved[i // s], chunks, c)
            x = mlp(x + o.flatten(1) @ p.out.weight.T, p.mlp)
    return norm(x, m.out_norm.weight) @ m.head.weight.T


def model(seed, **sizes):
    torch.manual_seed(seed)
    m = Model(Config(**{**TINY, **sizes})).double()
    for p in m.parameters():  # nothing may be at a value that hides a mistake
        if p.dim() == 1:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return m


class TheModel(unittest.TestCase):
    def check(self, n_chunks, n_tail, **sizes):
        m = model(n_chunks, **sizes)
        tokens = torch.randint(0, 64, (2, n_chunks, 8))
        with torch.no_grad():
            got = m(tokens, n_tail)
            for b in range(2):
                want = reference(m, tokens[b], n_tail)
                torch.testing.assert_close(got[b].flatten(0, 1), want, rtol=1e-5, atol=1e-6)

    def test_equals_plain_loops_with_one_group_and_with_two(self):
        for groups in (1, 2):
            self.check(7, 4, lower=2, encoder=2, upper=2, groups=groups)

    def test_no_body_fewer_chunks_than_k_and_a_tail_of_one(self):
        self.check(3, 3, lower=1, encoder=1, upper=2, groups=2)
        self.check(4, 1, lower=1, encoder=1, upper=1, groups=1)

    def test_gradients_through_the_product_are_those_of_picking(self):
        m = model(5, lower=1, encoder=1, upper=2, groups=2)
        tokens = torch.randint(0, 64, (2, 6, 8))

        def gradients():
            m.zero_grad()
            m(tokens, 3).square().sum().backward()
            return [p.grad.clone() for p in m.parameters()]

        by_product, original = gradients(), Memory._gather_by_product

        def by_index(self, ids):
            kv = torch.cat([self.body[1], self.tail[1]], dim=1)
            return kv[torch.arange(len(ids))[:, None, None], ids]

        Memory._gather_by_product = by_index
        try:
            for a, b in zip(by_product, gradients()):
                torch.testing.assert_close(a, b)
        finally:
            Memory._gather_by_product = original

    def test_later_tokens_change_nothing_before_them(self):
        m = model(6, lower=2, encoder=1, upper=2, groups=2)
        tokens = torch.randint(0, 64, (1, 6, 8))
        other = tokens.clone()
        other[0, 4, 3] = (other[0, 4, 3] + 1) % 64
        with torch.no_grad():
            a, b = m(tokens, 4)[0].flatten(0, 1), m(other, 4)[0].flatten(0, 1)
        self.assertTrue(torch.equal(a[: 2 * 8 + 3], b[: 2 * 8 + 3]))
        self.assertFalse(torch.equal(a[2 * 8 + 3], b[2 * 8 + 3]))


class TheHaystack(unittest.TestCase):
    def test_patched_fillers_are_the_whole_contexts(self):
        torch.manual_seed(8)
        sizes = dict(hidden=16, heads=2, mlp=32, lower=2, encoder=1, upper=2, window=64, topk=4)
        m = Model(Config(**sizes)).eval()
        rng = np.random.default_rng(9)
        stack = haystack.Haystack(m, 40, rng, "cpu")
        kinds = [data.MULTIKEY, data.TWOHOP, data.PASSKEY]
        for n_links in (2, 8):
            tokens, labels, _, _ = data.batch(rng, 3, 40, kinds, 9, n_links, filler=stack.filler)
            got = stack.logits(tokens, labels.shape[1])
            with torch.no_grad():
                want = m(torch.from_numpy(tokens.astype(np.int64)), labels.shape[1])
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
            unpatched = stack.marks.clone(), stack.kv.clone()
            stack.ask(rng, kinds, 2, 9, n_links)
            self.assertTrue(torch.equal(stack.marks, unpatched[0]))
            self.assertTrue(torch.equal(stack.kv, unpatched[1]))


class TheData(unittest.TestCase):
    def needle(self, row, *start, n=data.VALUE):
        """The n tokens behind the only place where `start` lies in the row."""
        hits = [i for i in range(len(row)) if tuple(row[i : i + len(start)]) == start]
        self.assertEqual(len(hits), 1)
        return list(row[hits[0] + len(start) :][:n])

    def check_targets(self, tokens, targets, kind, at, value):
        """The chunk of the last hop has the value, that of the first one the link to it."""
        first, last = tokens[targets[at, 0]], tokens[targets[at, 1]]
        i = list(last).index(data.VAL)
        self.assertEqual(list(last[i + 1 : i + 5]), value)
        if kind == data.TWOHOP:
            i = list(first).index(data.LINK)
            j = list(last).index(data.KEY)
            self.assertEqual(list(first[i + 1 : i + 3]), list(last[j + 1 : j + 3]))
            self.assertEqual(list(targets[at - 1]), [targets[at, 0]] * 2)
        else:
            self.assertEqual(targets[at, 0], targets[at, 1])

    def test_each_answer_is_what_its_needle_says(self):
        kinds, n_copied = [data.MULTIKEY, data.TWOHOP, data.PASSKEY, data.MULTIKEY], []
        for hard in (False, True):
            rng = np.random.default_rng([1, hard])
            tokens, labels, targets, answers = data.batch(rng, 5, 12, kinds, 6, 4, hard)
            self.assertEqual([kind for kind, _ in answers], kinds)
            self.assertTrue((tokens[:, :, 63] == 0).all() and (tokens[:, :, :63] > 0).all())
            for b in range(5):
                body = tokens[b, :12].flatten()
                for kind, at in answers:
                    question = tokens[b, 12 + at - 1]
                    if kind == data.PASSKEY:
                        self.assertIn(data.ASKP, question)
                        value = self.needle(body, data.PASS, data.VAL)
                    else:
                        token = data.ASK if kind == data.MULTIKEY else data.ASK2
                        i = list(question).index(token)
                        key = question[i + 1 : i + 3]
                        if kind == data.TWOHOP:
                            key = self.needle(body, data.KEY, *key, data.LINK)[:2]
                            hops = labels[b, at - 1][question == data.HOP]
                            self.assertEqual(list(hops), list(key))
                        value = self.needle(body, data.KEY, *key, data.VAL)
                    self.assertEqual(list(labels[b, at, :4]), value)
                    self.check_targets(tokens[b], targets[b], kind, at, value)
                    n = int((labels[b, at, :28] >= 0).sum())
                    said = list(tokens[b, 12 + at, 1 : 1 + n])
                    self.assertEqual(tokens[b, 12 + at, 0], data.VAL)
                    self.assertEqual(said, list(labels[b, at, :n]))
                    self.assertEqual(self.needle(body, *said[:4], n=n - 4), said[4:])
                    self.assertTrue(n == 28 or self.needle(body, *said)[0] == 0)
                    n_copied.append(n - 4)
        self.assertEqual(max(n_copied), data.COPY)
        self.assertLess(min(n_copied), data.COPY)

    def test_a_step_has_one_batch_and_its_length_is_bounded(self):
        for step in range(40):
            a = data.training_batch(3, step, (8, 240), 4096)
            b = data.training_batch(3, step, (8, 240), 4096)
            self.assertTrue(all(np.array_equal(a[i], b[i]) for i in range(5)))
            self.assertLessEqual(a[1].shape[1] * data.CHUNK, 16384)


def arguments(folder, *more):
    text = f"--out {folder} --device cpu --hidden 32 --heads 2 --lower 1 --upper 2 --round 4"
    text += " --tokens 1024 --bodies 3 --warmup 10 --lr 0.005 --eval-seconds 0 --seconds 1000"
    return train.parser().parse_args(text.split() + list(more))


class Training(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def files(self, name):
        folder = os.path.join(self.folder, name)
        out = {}
        for file in train.FILES.values():
            out[file] = weights.load(os.path.join(folder, file))[0]
        return out

    def test_two_pieces_equal_one(self):
        train.run(arguments(os.path.join(self.folder, "one"), "--steps", "8"))
        train.run(arguments(os.path.join(self.folder, "two"), "--steps", "4"))
        before = self.files("two")
        train.run(arguments(os.path.join(self.folder, "two"), "--steps", "8"))
        one, two = self.files("one"), self.files("two")
        for file, tensors in one.items():
            self.assertTrue(all(torch.equal(t, two[file][name]) for name, t in tensors.items()))
            self.assertFalse(all(torch.equal(t, before[file][name]) for name, t in tensors.items()))
        with open(os.path.join(self.folder, "two", "log.jsonl"), encoding="utf-8") as f:
            self.assertEqual([json.loads(line)["step"] for line in f], [4, 8])

    def test_other_settings_do_not_go_on(self):
        train.run(arguments(self.folder, "--steps", "4"))
        with self.assertRaisesRegex(ValueError, "is a run with"):
            train.run(arguments(self.folder, "--steps", "8", "--seed", "2"))

    def test_the_loss_of_one_batch_falls(self):
        trainer = train.Trainer(arguments(self.folder))
        batch = trainer._make_batch(0, 0)
        trainer._next_batch = lambda: batch
        losses = [trainer.one_round()["loss"] for _ in range(8)]
        self.assertLess(losses[-1], 0.7 * losses[0])

    def test_the_guide_wants_each_groups_own_hop(self):
        trainer = train.Trainer(arguments(self.folder))
        targets = torch.full((1, 3, 2), -1)
        targets[0, 2] = torch.tensor([4, 1])
        right = torch.full((1, 2, 6), -20.0)
        first, last = right.clone(), right.clone()
        first[0, 1, 4], last[0, 1, 1] = 20.0, 20.0
        self.assertLess(float(trainer.guide([first, last], targets)), 1e-6)
        self.assertGreater(float(trainer.guide([last, first], targets)), 20.0)
        self.assertLess(float(trainer.guide([last], targets)), 1e-6)

    def test_right_needs_every_token_of_the_answer(self):
        labels = torch.full((2, 3, 64), -1)
        labels[:, 2, :4] = torch.tensor([5, 6, 7, 8])
        logits = torch.zeros(2, 3, 64, 16)
        for j in range(4):
            logits[:, 2, j, 5 + j] = 1
        logits[1, 2, 3, 9] = 2
        ((kind, ok),) = data.right(logits, labels, [("passkey", 2)])
        self.assertEqual((kind, ok.tolist()), ("passkey", [True, False]))

    def test_the_file_is_what_others_read(self):
        path = os.path.join(self.folder, "x.safetensors")
        tensors = {"b": torch.randn(3, 2), "a": torch.arange(4.0)}
        weights.save(path, tensors, {"k": "v"})
        back, metadata = weights.load(path)
        self.assertEqual(metadata, {"k": "v"})
        self.assertTrue(all(torch.equal(t, back[name]) for name, t in tensors.items()))
        half = os.path.join(self.folder, "half.safetensors")
        weights.halve(path, half)
        rounded, metadata = weights.load(half)
        self.assertEqual(metadata, {"k": "v"})
        for name, t in tensors.items():
            self.assertTrue(torch.equal(t.bfloat16().float(), rounded[name]))
        if need.importlib.util.find_spec("safetensors"):
            from safetensors.torch import load_file

            self.assertTrue(all(torch.equal(t, tensors[n]) for n, t in load_file(path).items()))


if __name__ == "__main__":
    unittest.main()
