"""The text that is read: verses with passkeys hidden among them, and the questions to it.

A passkey is three like lines, "## Berlin: 48213"; its question is the line's beginning, and the
model continues. A verse is asked for by its first tokens. Everything follows from the seed.
"""

import random
import subprocess
from dataclasses import dataclass
from pathlib import Path

CITIES = (
    "Berlin Toronto Madrid Chicago Oslo Sydney Lima Nairobi Kyoto Dublin Warsaw Havana Cairo "
    "Boston Prague Vienna Athens Lisbon Geneva Denver"
).split()
VERSE_SHOWN, VERSE_ASKED = 10, 10  # tokens


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
        names = rng.sample(CITIES, n_passkeys)
        values = ["".join(rng.choice("0123456789") for _ in range(5)) for _ in names]
        needles = [self.encode(f"## {x}: {v}\n" * 3) for x, v in zip(names, values)]
        depths = [(i + 0.5) / n_passkeys for i in range(n_passkeys)]
        ids, questions, verses, hidden, at = [], [], [], 0, start
        while len(ids) < n_tokens + n_tail:
            while hidden < n_passkeys and len(ids) >= depths[hidden] * n_tokens:
                place = list(range(len(ids), len(ids) + len(needles[hidden])))
                questions.append(
                    self._passkey(names[hidden], values[hidden], place, len(ids) / n_tokens)
                )
                ids += needles[hidden]
                hidden += 1
            verse = self.encode(self.verses[at % len(self.verses)] + "\n")
            if len(verse) >= VERSE_SHOWN + VERSE_ASKED + 1 and len(ids) + len(verse) < n_tokens:
                verses.append((len(ids), verse))
            ids += verse
            at += 1
        for i in range(min(n_verses, len(verses))):
            first, verse = verses[int((i + 0.5) / n_verses * len(verses))]
            questions.append(self._verse(first, verse, first / n_tokens))
        return Context(ids[:n_tokens], ids[n_tokens : n_tokens + n_tail], questions)

    def _passkey(self, name, value, place, depth):
        return Question(
            "passkey", name, self.encode(f"\n## {name}:"), self.encode(f" {value}"), place, depth
        )

    def _verse(self, first, verse, depth):
        asked = VERSE_SHOWN + VERSE_ASKED
        return Question(
            "verse",
            "verse",
            self.encode("\n") + verse[:VERSE_SHOWN],
            verse[VERSE_SHOWN:asked],
            list(range(first + VERSE_SHOWN, first + asked)),
            depth,
        )
