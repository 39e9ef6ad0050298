"""The text that is read: verses with passkeys hidden among them, and the questions to it.

A passkey is three like lines, "## Berlin: 48213"; its question is the line's beginning, and the
model continues. Up to four passkeys have forms of their own: so small a model takes lines that
begin alike for one another. A verse is asked for by its first tokens. Everything follows from the
seed.
"""

import hashlib
import json
import random
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

# (the hidden line, the question, the names it is used with)
FORMS = (
    ("## {x}: {v}", "\n## {x}:", "Berlin Toronto Madrid Chicago Oslo Sydney Lima Nairobi"),
    ("Call {x} at {v}.", "\nCall {x} at", "Martha Victor Oscar Julia Walter Helen Bruno Alice"),
    ("{x} = {v}", "\n{x} =", "banana guitar window rocket pencil tiger bottle garden"),
    ("The pass key for {x} is {v}.", "\nThe pass key for {x} is", "Kyoto Dublin Warsaw Havana"),
)
VERSE_SHOWN, VERSE_ASKED = 10, 10  # tokens


def digest(*parts):
    """A short name for what was computed from parts: lists, numbers, text, None."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@dataclass
class Question:
    """What is fed, what should follow, and where in the context it stands."""

    kind: str  # "passkey" or "verse"
    name: str
    ask: list
    answer: list
    positions: list
    depth: float


@dataclass
class Context:
    """Token ids of exactly the length asked for, what follows them in the book, the questions."""

    ids: list
    tail: list
    questions: list

    def digest(self):
        """Differs as soon as a token, a question or an answer does."""
        return digest(asdict(self))


def load_verses(path, cached):
    """The verses of a text file, or of Debian's bible; without their numbers."""
    source = Path(path) if path else cached
    if not source.exists():
        try:
            out = subprocess.run(
                ["bible", "-f", "gen1:1-rev22:21"], check=True, capture_output=True
            ).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(
                f"quickstart: no text: {error}; install bible-kjv, bible-kjv-text, or give --text"
            ) from error
        source.write_bytes(out)
    lines = source.read_text(encoding="utf-8", errors="replace").splitlines()
    if path:
        return [line.strip() for line in lines if line.strip()]
    return [line.split(" ", 1)[1].strip() for line in lines if " " in line]


class Builder:
    """Makes contexts of verses with a tokenizer."""

    def __init__(self, tokenizer, verses):
        self.encode = lambda text: tokenizer(text, verbose=False).input_ids
        self.verses = verses

    def build(self, n_tokens, n_passkeys, n_verses, seed, start=0, n_tail=64):
        """A Context of exactly n_tokens, passkeys spread over its depth, from verse `start` on."""
        rng = random.Random(seed)
        keys = self._passkeys(rng, n_passkeys)
        depths = [(i + 0.5) / n_passkeys for i in range(n_passkeys)]
        ids, questions, verses, hidden, at = [], [], [], 0, start
        while len(ids) < n_tokens + n_tail:
            while hidden < n_passkeys and len(ids) >= depths[hidden] * n_tokens:
                questions.append(self._hide(ids, keys[hidden], n_tokens))
                hidden += 1
            verse = self.encode(self.verses[at % len(self.verses)] + "\n")
            if len(verse) >= VERSE_SHOWN + VERSE_ASKED + 1 and len(ids) + len(verse) < n_tokens:
                verses.append((len(ids), verse))
            ids += verse
            at += 1
        for i in range(min(n_verses, len(verses))):
            first, verse = verses[int((i + 0.5) / n_verses * len(verses))]
            questions.append(self._verse(i + 1, first, verse, first / n_tokens))
        return Context(ids[:n_tokens], ids[n_tokens : n_tokens + n_tail], questions)

    @staticmethod
    def _passkeys(rng, n):
        """n of (line, question, name, value), forms in turn, no name twice."""
        left = [rng.sample(names.split(), len(names.split())) for _, _, names in FORMS]
        keys = []
        for i in range(n):
            line, question, _ = FORMS[i % len(FORMS)]
            name, value = left[i % len(FORMS)].pop(), "".join(rng.choices("0123456789", k=5))
            keys.append((line.format(x=name, v=value) + "\n", question.format(x=name), name, value))
        return keys

    def _hide(self, ids, key, n_tokens):
        """Appends a passkey's lines to ids; its Question."""
        line, question, name, value = key
        needle, first = self.encode(line * 3), len(ids)
        ids += needle
        place = list(range(first, len(ids)))
        ask, answer = self.encode(question), self.encode(f" {value}")
        return Question("passkey", name, ask, answer, place, first / n_tokens)

    def _verse(self, number, first, verse, depth):
        asked = VERSE_SHOWN + VERSE_ASKED
        return Question(
            "verse",
            str(number),
            self.encode("\n") + verse[:VERSE_SHOWN],
            verse[VERSE_SHOWN:asked],
            list(range(first + VERSE_SHOWN, first + asked)),
            depth,
        )
