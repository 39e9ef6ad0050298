"""
The synthetic tasks: random tokens in which needles are hidden, and questions about them.

A context is a body of chunks, some of which hold one needle each among random tokens, and a tail
that asks. Needles: the passkey `PASS VAL v1..v4`, keys `KEY a1 a2 VAL v1..v4`, links `KEY a1 a2
LINK b1 b2` to another key's needle. A question ends its chunk's text and its answer, `VAL v1..v4`,
begins the next chunk:
passkey `ASKP`, multi-key `ASK a1 a2`, two-hop `ASK2 a1 a2`: a1 a2 names a link, the answer is the
value of the key that it names. A two-hop question has one more chunk before the answer, which asks
again and ends in `HOP HOP`, whose labels (never inputs) are b1 b2: time to follow the first hop.
After an answer come the tokens that follow the needle in its chunk, up to COPY of them, with labels
too: they are no part of the answer, but teach to copy long before answers do.
Targets say which chunk of the body a chunk of the tail needs, for training only.
Everything comes from (seed, step) alone.
"""

import numpy as np

CHUNK = 64
TEXT = CHUNK - 1  # rows of a chunk before the landmark
KEY, VAL, LINK, PASS, ASKP, ASK, ASK2, HOP = range(1, 9)
FIRST = 16  # ids from here on are plain tokens
VOCAB = 256
VALUE = 4
COPY = 24
PASSKEY, MULTIKEY, TWOHOP = "passkey", "multikey", "twohop"
KINDS = (PASSKEY, MULTIKEY, TWOHOP)


def plain(rng, *shape):
    """Random plain tokens."""
    return rng.integers(FIRST, VOCAB, shape, dtype=np.int64)


def distinct_keys(rng, n_rows, n, hard):
    """[n_rows, n, 2] keys, no two of a row equal; hard: first tokens are of few kinds, so that the
    second one counts."""
    pool = plain(rng, n_rows, 6)

    def draw(rows):
        keys = plain(rng, len(rows), n, 2)
        if hard:
            pick = rng.integers(0, pool.shape[1], (len(rows), n))
            keys[:, :, 0] = np.take_along_axis(pool[rows], pick, 1)
        return keys

    keys = draw(np.arange(n_rows))
    while True:
        names = np.sort(keys[:, :, 0] * VOCAB + keys[:, :, 1], axis=1)
        again = np.flatnonzero((names[:, 1:] == names[:, :-1]).any(axis=1))
        if not len(again):
            return keys
        keys[again] = draw(again)


def needles(rng, n_rows, n_keys, n_links, hard):
    """(needles [n_rows, 1 + n_keys + n_links, 8], keys, link keys); link i names key i. Rows after
    a needle's end are plain tokens."""
    n = 1 + n_keys + n_links
    out = plain(rng, n_rows, n, 4 + VALUE)
    keys = distinct_keys(rng, n_rows, n_keys + n_links, hard)
    out[:, 0, :2] = (PASS, VAL)
    out[:, 1:, 0] = KEY
    out[:, 1:, 1:3] = keys
    out[:, 1 : 1 + n_keys, 3] = VAL
    out[:, 1 + n_keys :, 3] = LINK
    out[:, 1 + n_keys :, 4:6] = keys[:, :n_links]
    return out, keys[:, :n_keys], keys[:, n_keys:]


def write(tokens, rows, chunks, offsets, text):
    """tokens[rows, chunks, offsets ..] = text; rows, chunks, offsets broadcast, text [.., n]."""
    at = offsets[..., None] + np.arange(text.shape[-1])
    tokens[rows[..., None], chunks[..., None], at] = text


def places(rng, n_rows, n_body, n):
    """[n_rows, n] chunks, no two of a row equal."""
    if n_body <= 4096:
        return np.argsort(rng.random((n_rows, n_body)), axis=1)[:, :n]
    return np.stack([rng.choice(n_body, n, replace=False) for _ in range(n_rows)])


def ask(rng, tokens, chunk, question):
    """Writes question [n_rows, n] into a chunk, anywhere behind an answer; its offsets."""
    n_rows, n = question.shape
    at = rng.integers(1 + VALUE + COPY, TEXT - n + 1, n_rows)
    write(tokens, np.arange(n_rows), np.full(n_rows, chunk), at, question)
    return at


def head_of(token, keys):
    """[n_rows, 3]: the token, then the two of the key."""
    return np.concatenate([np.full((len(keys), 1), token), keys], axis=1)


def answer(tokens, labels, chunk, at, source, begin):
    """Writes VAL, the value at [source, begin ..] of the body and what follows it into tail chunk
    `at`, the chunk'th of tokens. source, begin [n_rows]."""
    rows = np.arange(len(tokens))
    tokens[:, chunk, 0] = VAL
    for j in range(VALUE + COPY):
        there = begin + j < TEXT
        text = tokens[rows, source, np.minimum(begin + j, TEXT - 1)].astype(np.int64)
        tokens[:, chunk, 1 + j] = np.where(there, text, tokens[:, chunk, 1 + j])
        labels[:, at, j] = np.where(there, text, -1)


def tail_chunks(kinds):
    """How many chunks the questions of these kinds take."""
    return 1 + sum(2 if kind == TWOHOP else 1 for kind in kinds)


def batch(rng, n_rows, n_body, kinds, n_keys, n_links, hard=False, filler=None):
    """
    (tokens [n_rows, n_body + U, 64], labels [n_rows, U, 64], targets [n_rows, U, 2], answers):
    labels are -1 where nothing is asked; targets are the chunks that chunk u needs on its first and
    its last hop, or -1; answers lists (kind, chunk of the tail) in order. Two-hop questions take
    links from the first on, multi-key ones keys from the last down. filler [n_body, 64]: what all
    contexts have where no needle lies, instead of random tokens of their own.
    """
    n_tail = tail_chunks(kinds)
    if 1 + n_keys + n_links > n_body or n_links > n_keys:
        raise ValueError("each needle takes a chunk of the body, each link a key")
    if kinds.count(MULTIKEY) > n_keys or kinds.count(TWOHOP) > n_links:
        raise ValueError("more questions than needles")
    if filler is None:
        tokens = plain(rng, n_rows, n_body + n_tail, CHUNK)
    else:
        tokens = np.empty((n_rows, n_body + n_tail, CHUNK), dtype=filler.dtype)
        tokens[:, :n_body] = filler
        tokens[:, n_body:] = plain(rng, n_rows, n_tail, CHUNK)
    tokens[:, :, TEXT] = 0
    labels = np.full((n_rows, n_tail, CHUNK), -1, dtype=np.int64)
    targets = np.full((n_rows, n_tail, 2), -1, dtype=np.int64)
    text, keys, links = needles(rng, n_rows, n_keys, n_links, hard)
    rows = np.arange(n_rows)
    where = places(rng, n_rows, n_body, text.shape[1])
    offsets = rng.integers(0, TEXT - text.shape[2] + 1, where.shape)
    write(tokens, np.broadcast_to(rows[:, None], where.shape), where, offsets, text)
    at, hop, key, answers = 0, 0, n_keys, []
    for kind in kinds:
        needle, skip = 0, 2
        if kind == PASSKEY:
            ask(rng, tokens, n_body + at, np.full((n_rows, 1), ASKP))
        elif kind == MULTIKEY:
            key -= 1
            needle, skip = 1 + key, 4
            ask(rng, tokens, n_body + at, head_of(ASK, keys[:, key]))
        else:
            question = head_of(ASK2, links[:, hop])
            ask(rng, tokens, n_body + at, question)
            at += 1
            again = np.concatenate([question, np.full((n_rows, 2), HOP)], axis=1)
            first = ask(rng, tokens, n_body + at, again) + question.shape[1]
            for j in range(2):
                labels[rows, at, first + j] = keys[:, hop, j]
            link = where[:, 1 + n_keys + hop]
            targets[:, at] = targets[:, at + 1] = link[:, None]
            hop += 1
            needle, skip = hop, 4
        at += 1
        targets[:, at, 1] = where[:, needle]
        if kind != TWOHOP:
            targets[:, at, 0] = where[:, needle]
        answer(tokens, labels, n_body + at, at, where[:, needle], offsets[:, needle] + skip)
        answers.append((kind, at))
    return tokens, labels, targets, answers


def training_batch(seed, step, bodies, n_tokens):
    """(n_body,) + batch() of a step: a body length out of bodies, the last one more often than all
    others together, as many contexts as n_tokens hold, needles at random. The number and kinds of
    the questions hang on the body's length alone, so that steps come in few shapes."""
    rng = np.random.default_rng([seed, step])
    n_body = bodies[-1]
    if len(bodies) > 1 and rng.random() < 0.4:
        n_body = bodies[rng.integers(0, len(bodies) - 1)]
    n_multi = min(4, max(1, (n_body - 1) // 3))
    n_two = min(3, (n_body - 1 - n_multi) // 2)
    kinds = [PASSKEY] + [MULTIKEY] * n_multi + [TWOHOP] * n_two
    most = max(n_multi, min(32, (n_body - 1) * 2 // 3))
    n_keys = int(round(np.exp(rng.uniform(np.log(n_multi), np.log(most)))))
    n_links = int(rng.integers(n_two, max(n_two, min(n_keys, n_body - 1 - n_keys)) + 1))
    n_keys = max(n_keys, n_links)
    rng.shuffle(kinds)
    kinds = [str(kind) for kind in kinds]
    n_rows = max(1, n_tokens // (CHUNK * (n_body + tail_chunks(kinds))))
    hard = bool(rng.random() < 0.3)
    return (n_body,) + batch(rng, n_rows, n_body, kinds, n_keys, n_links, hard)


def right(logits, labels, answers):
    """[(kind, bool [n_rows])] for logits [n_rows, U, S, vocab], labels [n_rows, U, S]."""
    out = []
    for kind, chunk in answers:
        guess = logits[:, chunk, :VALUE].argmax(-1)
        out.append((kind, (guess == labels[:, chunk, :VALUE]).all(-1)))
    return out


def beside(kind, n_body):
    """(n_keys, n_links) of an evaluation: the needles beside which the asked one lies."""
    if kind == PASSKEY:
        return 0, 0
    if kind == MULTIKEY:
        return min(32, n_body // 2), 0
    n = min(16, (n_body - 1) // 2)
    return n, n
