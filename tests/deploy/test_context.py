"""The text that the quickstart reads: lengths, hidden lines, questions, names of caches."""

import unittest

import paths  # noqa: F401
import context

VERSES = [f"Verse {i}: in year{i % 7} they all went to place{i % 11}." * 3 for i in range(99)]


class Letters:
    """A tokenizer whose tokens are the characters' codes."""

    def __call__(self, text, verbose=True):
        self.input_ids = [ord(c) for c in text]
        return self

    @staticmethod
    def text(ids):
        return "".join(map(chr, ids))


def build(n_tokens=20000, n_passkeys=4, n_verses=3, seed=11, verses=VERSES):
    return context.Builder(Letters(), verses).build(n_tokens, n_passkeys, n_verses, seed)


class Contexts(unittest.TestCase):
    def test_lengths(self):
        for n in (4096, 5000, 20000):
            made = build(n)
            self.assertEqual((len(made.ids), len(made.tail)), (n, 64))

    def test_every_passkey_is_where_its_question_says(self):
        made = build()
        keys = [q for q in made.questions if q.kind == "passkey"]
        self.assertEqual(len(keys), 4)
        for question in keys:
            first, last = question.positions[0], question.positions[-1]
            self.assertEqual(question.positions, list(range(first, last + 1)))
            hidden = Letters.text(made.ids[first : last + 1])
            lines = hidden.splitlines()
            self.assertEqual((len(lines), len(set(lines))), (3, 1), hidden)
            asked = Letters.text(question.ask + question.answer)
            self.assertEqual(asked[0], "\n")
            self.assertTrue(lines[0].startswith(asked[1:]), (lines[0], asked))
            self.assertRegex(Letters.text(question.answer), r"^ \d{5}$")
            self.assertAlmostEqual(question.depth, first / 20000)

    def test_passkeys_lie_at_even_depths(self):
        depths = [q.depth for q in build().questions if q.kind == "passkey"]
        for i, depth in enumerate(depths):
            self.assertAlmostEqual(depth, (i + 0.5) / 4, delta=0.03)

    def test_no_two_hidden_lines_begin_alike(self):
        """Else a small model takes one for another."""
        asks = [Letters.text(q.ask) for q in build(60000, 16).questions if q.kind == "passkey"]
        self.assertEqual(len(set(asks)), 16)
        begins = {q.split()[0] for q in asks[:4]}
        self.assertEqual(len(begins), 4)

    def test_a_verse_goes_on_as_in_the_text(self):
        made = build()
        verses = [q for q in made.questions if q.kind == "verse"]
        self.assertEqual(len(verses), 3)
        for question in verses:
            first = question.positions[0]
            self.assertEqual(made.ids[first : first + len(question.answer)], question.answer)
            shown = question.ask[1:]
            self.assertEqual(made.ids[first - len(shown) : first], shown)

    def test_the_seed_decides(self):
        self.assertEqual(build().digest(), build().digest())
        self.assertNotEqual(build().digest(), build(seed=12).digest())

    def test_the_digest_tells_texts_and_forms_apart(self):
        whole = build().digest()
        self.assertNotEqual(whole, build(verses=VERSES[1:]).digest())
        forms = context.FORMS
        try:
            context.FORMS = tuple((line, "\nTell me " + ask, n) for line, ask, n in forms)
            self.assertNotEqual(whole, build().digest())
        finally:
            context.FORMS = forms


class Digest(unittest.TestCase):
    def test_parts_do_not_run_together(self):
        self.assertNotEqual(context.digest("ab", "c"), context.digest("a", "bc"))
        self.assertNotEqual(context.digest([1, 2], 3), context.digest([1], [2, 3]))
        self.assertRegex(context.digest(), "^[0-9a-f]{16}$")


if __name__ == "__main__":
    unittest.main()
