/*
 * names.c: what blocks are called: digests of their tokens, and of what else decides their values.
 *
 * Runs on the sequence's thread. A digest's extra is, in this order, each only where it applies:
 * the sequence's label ("adapter=NAME\n", "salt=SALT\n"); the passes, as pairs of u32 (first token,
 * tokens); 16 random bytes. A first token is below 2^30 and the first letters of a label, read as a
 * u32, are not, so a label is never taken for passes.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/digest.h"
#include "internal.h"

/* Adds one line to the label, which has room for both. */
static kvc_status add_label(kvw_seq *seq, const char *key, const char *text)
{
    if (text == NULL || text[0] == '\0') {
        return KVC_OK;
    }
    if (strnlen(text, KVC_MAX_NAME_BYTES + 1u) > KVC_MAX_NAME_BYTES || strchr(text, '\n') != NULL) {
        return kvwi_fail(KVC_INVALID, "%s: must be at most %u bytes, without a line's end", key,
                         KVC_MAX_NAME_BYTES);
    }
    seq->label_bytes += (uint32_t)snprintf(
        seq->label + seq->label_bytes, sizeof(seq->label) - seq->label_bytes, "%s=%s\n", key, text);
    return KVC_OK;
}

kvc_status kvwi_names_label(kvw_seq *seq, const char *adapter, const char *salt)
{
    kvc_status st = add_label(seq, "adapter", adapter);
    return st == KVC_OK ? add_label(seq, "salt", salt) : st;
}

/* The passes that touched a block, last first, as pairs at words; whether all were on the grid. */
static bool list_passes(const kvw_seq *seq, uint32_t block, uint32_t *words, uint32_t *n_p)
{
    const kvw_opts *o = &seq->worker->opts;
    uint32_t first = block * o->block_tokens, end = first + o->block_tokens, n = 0;
    bool on_grid = true;
    for (uint32_t i = seq->n_passes; i-- > 0;) {
        kvwi_pass p = seq->passes[i];
        if (p.first + p.n <= first) {
            break;
        }
        if (p.first < end && p.first + p.n > first) {
            on_grid = on_grid && p.n == o->chunk_tokens && p.first % o->chunk_tokens == 0;
            words[n++] = p.first;
            words[n++] = p.n;
        }
    }
    *n_p = n;
    return on_grid;
}

/*
 * What a block's digest says beyond its tokens: the label; nothing more where every pass that
 * touched it was a whole chunk on the grid, else the passes; once rows were dropped, or selected by
 * a query that turned out otherwise, a number nobody else has.
 */
static kvc_status digest_extra(kvw_seq *seq, uint32_t block, const void **extra_p, uint32_t *len_p)
{
    const kvw_opts *o = &seq->worker->opts;
    size_t words_bytes = 2u * o->block_tokens * sizeof(uint32_t);
    kvwi_buf *buf = &seq->append_buf;
    uint32_t n = 0;
    kvc_status st =
        kvwi_buf_need(buf, words_bytes + seq->label_bytes + words_bytes + sizeof(seq->taint));
    if (st != KVC_OK) {
        return st;
    }
    uint8_t *extra = (uint8_t *)buf->p + words_bytes;
    bool plain = list_passes(seq, block, buf->p, &n) || o->reuse_any;
    uint32_t len = seq->label_bytes, passes_bytes = plain ? 0 : n * (uint32_t)sizeof(uint32_t);
    memcpy(extra, seq->label, len);
    memcpy(extra + len, buf->p, passes_bytes);
    len += passes_bytes;
    if (seq->tainted) {
        memcpy(extra + len, seq->taint, sizeof(seq->taint));
        len += (uint32_t)sizeof(seq->taint);
    }
    *extra_p = extra;
    *len_p = len;
    return KVC_OK;
}

void kvwi_names_taint(kvw_seq *seq)
{
    if (seq->tainted) {
        return;
    }
    seq->tainted = true;
    if (getrandom(seq->taint, sizeof(seq->taint), 0) != (ssize_t)sizeof(seq->taint)) {
        /* no randomness to be had: the moment, and who */
        const uint64_t who = (uint64_t)(uintptr_t)seq ^ ((uint64_t)getpid() << 44);
        const uint64_t words[2] = {kvc_wall_ns(), kvc_now_ns() ^ who};
        _Static_assert(sizeof(words) == sizeof(seq->taint), "fills the taint");
        memcpy(seq->taint, words, sizeof(words));
    }
}

static kvc_status name(kvw_seq *seq, const uint32_t *tokens, uint32_t block, const void *extra,
                       uint32_t extra_bytes)
{
    const kvw_worker *w = seq->worker;
    uint32_t bt = w->opts.block_tokens;
    const kvc_digest *parent = block == 0 ? NULL : &seq->blocks[block - 1u].digest;
    return kvc_block_digest(&w->schema, parent, tokens + (size_t)block * bt, bt, extra, extra_bytes,
                            &seq->blocks[block].digest);
}

kvc_status kvwi_names_cold(kvw_seq *seq, const uint32_t *tokens, uint32_t block)
{
    return name(seq, tokens, block, seq->label, seq->label_bytes);
}

kvc_status kvwi_names_block(kvw_seq *seq, uint32_t block)
{
    const void *extra = NULL;
    uint32_t extra_bytes = 0;
    kvc_status st = digest_extra(seq, block, &extra, &extra_bytes);
    return st == KVC_OK ? name(seq, seq->tokens, block, extra, extra_bytes) : st;
}
