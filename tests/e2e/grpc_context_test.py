#!/usr/bin/env python3
"""The calls about contexts beyond open and extend, and matches with tiers, from Python grpcio with
generated stubs, against a real cachesvc.

Needs what grpc_api_test.py needs, and skips as it does.
"""

import sys
import unittest

sys.dont_write_bytecode = True

from grpc_api_test import BLOCK_TOKENS, Case, pb, row  # noqa: E402


class Contexts(Case):
    def cut(self, context, n_blocks):
        request = pb.TruncateContextRequest(context=context, n_blocks=n_blocks)
        return self.store.TruncateContext(request)

    def fork(self, context, n_blocks=0, ttl_ms=0):
        request = pb.ForkContextRequest(context=context, n_blocks=n_blocks, ttl_ms=ttl_ms)
        return self.store.ForkContext(request)

    def fetch(self, context, picks, part=0):
        group = pb.RowGroup(context=context, part=part, picks=picks)
        return self.store.FetchRows(pb.FetchRowsRequest(groups=[group]))

    def extend(self, context, before, digests):
        return self.store.ExtendContext(
            pb.ExtendContextRequest(
                context=context, n_blocks_before=before, digests=b"".join(digests)
            )
        )

    def test_truncate(self):
        digests = self.digests(30, 6)
        self.store.PutBlocks(self.put_request(digests, (0,)))
        context = self.open(digests).context
        for _ in range(2):
            self.assertEqual(self.cut(context, 3).n_tokens, 3 * BLOCK_TOKENS)
        reply = self.fetch(context, [5, 3 * BLOCK_TOKENS])
        self.assertEqual(reply.data, row(0, 5))
        self.assertEqual([(m.index, m.status) for m in reply.missing], [(1, pb.ITEM_NOT_FOUND)])
        self.assertEqual(self.extend(context, 3, digests[3:]).n_tokens, 6 * BLOCK_TOKENS)
        self.assertEqual(self.fetch(context, [300]).data, row(0, 300))
        self.assertEqual(self.cut(context, 0).n_tokens, 0)

    def test_fork(self):
        digests = self.digests(31, 6)
        self.store.PutBlocks(self.put_request(digests, (0,)))
        first = self.open(digests).context
        all_of_it, part_of_it = self.fork(first), self.fork(first, 4, ttl_ms=5000)
        self.assertEqual(all_of_it.n_tokens, 6 * BLOCK_TOKENS)
        self.assertEqual(part_of_it.n_tokens, 4 * BLOCK_TOKENS)
        self.assertEqual(part_of_it.ttl_ms, 5000)
        self.assertEqual(len({first, all_of_it.context, part_of_it.context}), 3)
        self.cut(first, 1)
        self.store.CloseContext(pb.CloseContextRequest(context=first))
        self.assertEqual(self.fetch(all_of_it.context, [383]).data, row(0, 383))
        self.assertEqual(len(self.fetch(part_of_it.context, [383]).missing), 1)

    def test_bad_input(self):
        digests = self.digests(32, 3)
        context = self.open(digests).context
        self.fails("INVALID", lambda: self.cut(context, 4), "n_blocks")
        self.fails("INVALID", lambda: self.cut(context, 0xFFFFFFFF), "n_blocks")
        self.fails("INVALID", lambda: self.fork(context, 4), "n_blocks")
        for wrong in (0, context + 1, context ^ (1 << 63), 0xFFFFFFFFFFFFFFFF):
            self.fails("STALE_HANDLE", lambda wrong=wrong: self.cut(wrong, 1), "open it again")
            self.fails("STALE_HANDLE", lambda wrong=wrong: self.fork(wrong), "open it again")
        self.assertEqual(self.extend(context, 3, []).n_tokens, 3 * BLOCK_TOKENS)
        self.serves()

    def test_long_lists_come_in_pages(self):
        limits = self.store.Describe(pb.DescribeRequest()).limits
        self.assertEqual(limits.max_digests, 16384)
        page = limits.max_digests
        digests = b"".join(i.to_bytes(32, "little") for i in range(2 * page + 100))
        too_many = pb.OpenContextRequest(schema=self.schema, digests=digests[: 32 * (page + 1)])
        self.fails("INVALID", lambda: self.store.OpenContext(too_many), "max_digests")
        too_many = pb.MatchPrefixRequest(schema=self.schema, digests=digests[: 32 * (page + 1)])
        self.fails("INVALID", lambda: self.store.MatchPrefix(too_many), "max_digests")
        opened = self.open([digests[: 32 * page]])
        for at in (page, 2 * page):
            grown = self.extend(opened.context, at, [digests[32 * at : 32 * (at + page)]])
        self.assertEqual(grown.n_tokens, (2 * page + 100) * BLOCK_TOKENS)
        self.assertEqual(self.cut(opened.context, page + 7).n_tokens, (page + 7) * BLOCK_TOKENS)
        twin = self.fork(opened.context)
        self.assertEqual(twin.n_tokens, (page + 7) * BLOCK_TOKENS)
        same = pb.ExtendContextRequest(
            context=twin.context, n_blocks_before=page, digests=digests[32 * page : 32 * (page + 7)]
        )
        self.assertEqual(self.store.ExtendContext(same).n_tokens, twin.n_tokens)


class Tiers(Case):
    """A dram of 1 MiB: 16 values of part 1."""

    args = ("--dram-bytes", "1MiB", "--lmdb-path", "FOLDER/values", "--lmdb-bytes", "256MiB")

    def test_tiers(self):
        digests = self.digests(40, 40)
        for i, digest in enumerate(digests):
            request = self.put_request([digest], (1,), pb.PROMISE_DURABLE, i)
            self.assertEqual(list(self.store.PutBlocks(request).status), [pb.ITEM_OK])
        ask = pb.MatchPrefixRequest(
            schema=self.schema, digests=b"".join(digests + [bytes(32)]), parts=[1], want_tiers=True
        )
        reply = self.store.MatchPrefix(ask)
        self.assertEqual(reply.hits, 40)
        self.assertEqual(len(reply.tiers), 40)
        self.assertEqual(set(reply.tiers), {pb.TIER_DRAM, pb.TIER_LMDB})
        self.assertEqual(list(reply.tiers).count(pb.TIER_DRAM), 16)
        # What the tiers say is where the rows come from.
        context = self.open(digests).context
        for i in (0, 20, 39):
            group = pb.RowGroup(context=context, part=1, picks=[i * BLOCK_TOKENS])
            rows = self.store.FetchRows(pb.FetchRowsRequest(groups=[group]))
            self.assertEqual(rows.rows_dram, int(reply.tiers[i] == pb.TIER_DRAM))
            self.assertEqual(rows.rows_lmdb, int(reply.tiers[i] == pb.TIER_LMDB))
        ask.want_tiers = False
        self.assertEqual(list(self.store.MatchPrefix(ask).tiers), [])
        ask.digests, ask.want_tiers = bytes(32), True
        self.assertEqual(self.store.MatchPrefix(ask).hits, 0)


if __name__ == "__main__":
    unittest.main(verbosity=2)
