/*
 * context_file.c: reading and writing the file that holds a context; see context_file.h.
 *
 * No state, any thread. Input is checked before it is used: counts against their limits before
 * memory is asked for, tables and values against their sums before anybody sees them. Memory grows
 * with what was really read, so a short file with large counts costs little.
 */
#include "context_file.h"

#include <stdlib.h>
#include <string.h>

#include "base/digest.h"
#include "base/le.h"
#include "base/sum.h"

#define MAGIC       "KVCTX002"
#define END_MARK    "KVCTXEND"
#define MARK_BYTES  8u
#define HEAD_BYTES  72u /* magic, schema, four counts, sum of all, two counts */
#define SUM_OFF     56u
#define RECORD_HEAD 16u /* length, zero, sum */
#define GROW_BYTES  ((size_t)1 << 20)

static size_t tables_bytes(const kvctl_file_head *head)
{
    return (size_t)head->n_blocks * KVC_DIGEST_BYTES + (size_t)head->n_parts * 8 +
           (size_t)head->n_tokens * 4 + head->schema_bytes + head->tail_bytes;
}

/* ---- reading --------------------------------------------------------------------------------- */

/* A file under way. */
typedef struct walk {
    kvctl_file_read *read;
    void *read_arg;
    kvctl_file_head head;
    uint8_t *bytes; /* head and tables as they were read */
    void *tables;   /* the same in memory's order */
    uint8_t *value; /* [largest value_bytes] */
    const char *why;
} walk;

static kvc_status refuse(walk *w, kvc_status status, const char *why)
{
    w->why = why;
    return status;
}

static kvc_status cut_off(walk *w)
{
    return refuse(w, KVC_PROTOCOL, "the file is cut off, or cannot be read");
}

static kvc_status check_counts(walk *w)
{
    const kvctl_file_head *head = &w->head;
    uint64_t tokens = (uint64_t)head->n_blocks * head->block_tokens;
    if (head->block_tokens < KVC_BLOCK_TOKENS_MIN || head->block_tokens > KVC_BLOCK_TOKENS_MAX)
        return refuse(w, KVC_INVALID, "block_tokens is out of range");
    if (head->n_blocks > KVC_MAX_CONTEXT_BLOCKS)
        return refuse(w, KVC_INVALID, "it has more blocks than a context may have");
    if (head->n_parts == 0 || head->n_parts > KVC_MAX_PARTS)
        return refuse(w, KVC_INVALID, "it must have 1 to 4096 parts");
    if (head->n_tokens > KVCTL_FILE_MAX_TOKENS)
        return refuse(w, KVC_INVALID, "it has more token ids than are allowed");
    if (head->schema_bytes > KVCTL_FILE_MAX_SCHEMA || head->tail_bytes > KVCTL_FILE_MAX_TAIL)
        return refuse(w, KVC_INVALID, "its schema or its tail is longer than allowed");
    if (head->n_tokens != 0 &&
        (head->n_tokens < tokens || head->n_tokens - tokens >= head->block_tokens))
        return refuse(w, KVC_INVALID, "the token ids do not fit the blocks");
    return KVC_OK;
}

/* Appends n bytes of the file to w->bytes [have], growing in steps. */
static kvc_status read_more(walk *w, size_t have, size_t n)
{
    while (n > 0) {
        size_t step = n < GROW_BYTES ? n : GROW_BYTES;
        uint8_t *more = realloc(w->bytes, have + step);
        if (more == NULL)
            return refuse(w, KVC_NO_MEMORY, "memory is out");
        w->bytes = more;
        if (!w->read(w->read_arg, more + have, step))
            return cut_off(w);
        have += step;
        n -= step;
    }
    return KVC_OK;
}

static kvc_status read_tables(walk *w)
{
    kvctl_file_head *head = &w->head;
    size_t n = tables_bytes(head);
    kvc_status status = read_more(w, HEAD_BYTES, n);
    if (status != KVC_OK)
        return status;
    /* The sum's own place counts as zeros. */
    uint64_t sum = kvc_le_get(w->bytes + SUM_OFF, 8);
    kvc_le_put(w->bytes + SUM_OFF, 0, 8);
    if (sum != kvc_value_sum(w->bytes, HEAD_BYTES + n))
        return refuse(w, KVC_CORRUPT, "the sum of its tables is wrong");
    const uint8_t *at = w->bytes + HEAD_BYTES;
    uint32_t *numbers = calloc(2 * (size_t)head->n_parts + head->n_tokens, 4);
    if (numbers == NULL)
        return refuse(w, KVC_NO_MEMORY, "memory is out");
    w->tables = numbers;
    head->digests = (const kvc_digest *)(const void *)at;
    at += (size_t)head->n_blocks * KVC_DIGEST_BYTES;
    for (size_t i = 0; i < 2 * (size_t)head->n_parts + head->n_tokens; i++)
        numbers[i] = (uint32_t)kvc_le_get(at + 4 * i, 4);
    head->parts = (const kvctl_file_part *)(const void *)numbers;
    head->tokens = numbers + 2 * (size_t)head->n_parts;
    head->schema_msg = at + 4 * (2 * (size_t)head->n_parts + head->n_tokens);
    head->tail = head->schema_msg + head->schema_bytes;
    return KVC_OK;
}

static kvc_status read_head(walk *w)
{
    kvctl_file_head *head = &w->head;
    kvc_status status = read_more(w, 0, HEAD_BYTES);
    if (status != KVC_OK)
        return status;
    if (memcmp(w->bytes, MAGIC, MARK_BYTES) != 0)
        return refuse(w, KVC_PROTOCOL, "it is not a context file of this version");
    memcpy(&head->schema, w->bytes + MARK_BYTES, KVC_DIGEST_BYTES);
    head->block_tokens = (uint32_t)kvc_le_get(w->bytes + 40, 4);
    head->n_blocks = (uint32_t)kvc_le_get(w->bytes + 44, 4);
    head->n_parts = (uint32_t)kvc_le_get(w->bytes + 48, 4);
    head->n_tokens = (uint32_t)kvc_le_get(w->bytes + 52, 4);
    head->schema_bytes = (uint32_t)kvc_le_get(w->bytes + 64, 4);
    head->tail_bytes = (uint32_t)kvc_le_get(w->bytes + 68, 4);
    status = check_counts(w);
    return status == KVC_OK ? read_tables(w) : status;
}

/* Parts in range and named once; gives room for the largest value. */
static kvc_status check_parts(walk *w)
{
    uint32_t largest = 1;
    uint64_t row_bytes = 0, tail = w->head.n_tokens % w->head.block_tokens;
    for (uint32_t i = 0; i < w->head.n_parts; i++) {
        const kvctl_file_part *part = &w->head.parts[i];
        if (part->part > KVC_MAX_PART_ID || (i > 0 && part->part <= part[-1].part))
            return refuse(w, KVC_INVALID, "its parts are not in ascending order");
        if (part->value_bytes == 0 || part->value_bytes > KVC_MAX_VALUE_BYTES ||
            part->value_bytes % w->head.block_tokens != 0)
            return refuse(w, KVC_INVALID, "a part's length is not one of a value");
        largest = part->value_bytes > largest ? part->value_bytes : largest;
        row_bytes += part->value_bytes / w->head.block_tokens;
    }
    if (w->head.tail_bytes != 0 && w->head.tail_bytes != tail * row_bytes)
        return refuse(w, KVC_INVALID, "its tail is not one row of each part for each token");
    w->value = malloc(largest);
    return w->value != NULL ? KVC_OK : refuse(w, KVC_NO_MEMORY, "memory is out");
}

/* Token ids say what the digests must be. */
static kvc_status check_digests(walk *w)
{
    const kvctl_file_head *head = &w->head;
    kvc_digest digest;
    for (uint32_t i = 0; head->n_tokens != 0 && i < head->n_blocks; i++) {
        kvc_status status = kvc_block_digest(&head->schema, i == 0 ? NULL : &head->digests[i - 1],
                                             head->tokens + (size_t)i * head->block_tokens,
                                             head->block_tokens, NULL, 0, &digest);
        if (status != KVC_OK || !kvc_digest_equal(&digest, &head->digests[i]))
            return refuse(w, KVC_CORRUPT, "its digests are not those of its token ids");
    }
    return KVC_OK;
}

/* One record; *there_p: a value is in w->value. */
static kvc_status read_value(walk *w, uint32_t want_bytes, bool *there_p)
{
    uint8_t record[RECORD_HEAD];
    if (!w->read(w->read_arg, record, sizeof(record)))
        return cut_off(w);
    uint32_t len_bytes = (uint32_t)kvc_le_get(record, 4);
    *there_p = len_bytes != 0;
    if ((len_bytes != 0 && len_bytes != want_bytes) || (uint32_t)kvc_le_get(record + 4, 4) != 0)
        return refuse(w, KVC_INVALID, "a value's length is not its part's");
    if (len_bytes == 0)
        return kvc_le_get(record + 8, 8) == 0 ? KVC_OK
                                              : refuse(w, KVC_CORRUPT, "a value's sum is wrong");
    if (!w->read(w->read_arg, w->value, len_bytes))
        return cut_off(w);
    if (kvc_le_get(record + 8, 8) != kvc_value_sum(w->value, len_bytes))
        return refuse(w, KVC_CORRUPT, "a value's sum is wrong");
    return KVC_OK;
}

static kvc_status read_values(walk *w, kvctl_file_value *each, void *each_arg, uint64_t *n_p)
{
    uint8_t end[2 * MARK_BYTES], more;
    for (uint32_t b = 0; b < w->head.n_blocks; b++) {
        for (uint32_t p = 0; p < w->head.n_parts; p++) {
            bool there;
            kvc_status status = read_value(w, w->head.parts[p].value_bytes, &there);
            if (status != KVC_OK)
                return status;
            *n_p += there;
            if (there && each != NULL && !each(each_arg, &w->head, b, p, w->value))
                return refuse(w, KVC_CANCELLED, "it was not gone through to its end");
        }
    }
    if (!w->read(w->read_arg, end, sizeof(end)))
        return cut_off(w);
    if (memcmp(end, END_MARK, MARK_BYTES) != 0 || kvc_le_get(end + MARK_BYTES, 8) != *n_p)
        return refuse(w, KVC_CORRUPT, "its end mark is wrong");
    if (w->read(w->read_arg, &more, 1))
        return refuse(w, KVC_CORRUPT, "there is something behind its end");
    return KVC_OK;
}

kvc_status kvctl_file_walk(kvctl_file_read *read, void *read_arg, kvctl_file_opened *opened,
                           kvctl_file_value *each, void *arg, kvctl_file_totals *totals_p,
                           const char **why_p)
{
    walk w = {.read = read, .read_arg = read_arg};
    *totals_p = (kvctl_file_totals){0};
    kvc_status status = read_head(&w);
    if (status == KVC_OK)
        status = check_parts(&w);
    if (status == KVC_OK)
        status = check_digests(&w);
    if (status == KVC_OK && opened != NULL && !opened(arg, &w.head))
        status = refuse(&w, KVC_CANCELLED, "it was not gone through to its end");
    if (status == KVC_OK) {
        totals_p->n_blocks = w.head.n_blocks;
        totals_p->n_parts = w.head.n_parts;
        totals_p->n_tokens = w.head.n_tokens;
        status = read_values(&w, each, arg, &totals_p->n_values);
    }
    free(w.bytes);
    free(w.tables);
    free(w.value);
    *why_p = status == KVC_OK ? NULL : w.why;
    return status;
}

/* ---- writing --------------------------------------------------------------------------------- */

bool kvctl_file_put_head(kvctl_file_write *write, void *arg, const kvctl_file_head *head)
{
    size_t n = HEAD_BYTES + tables_bytes(head);
    uint8_t *bytes = calloc(1, n);
    if (bytes == NULL)
        return false;
    memcpy(bytes, MAGIC, MARK_BYTES);
    memcpy(bytes + MARK_BYTES, &head->schema, KVC_DIGEST_BYTES);
    kvc_le_put(bytes + 40, head->block_tokens, 4);
    kvc_le_put(bytes + 44, head->n_blocks, 4);
    kvc_le_put(bytes + 48, head->n_parts, 4);
    kvc_le_put(bytes + 52, head->n_tokens, 4);
    uint8_t *at = bytes + HEAD_BYTES;
    if (head->n_blocks > 0)
        memcpy(at, head->digests, (size_t)head->n_blocks * KVC_DIGEST_BYTES);
    at += (size_t)head->n_blocks * KVC_DIGEST_BYTES;
    for (uint32_t i = 0; i < head->n_parts; i++, at += 8) {
        kvc_le_put(at, head->parts[i].part, 4);
        kvc_le_put(at + 4, head->parts[i].value_bytes, 4);
    }
    for (uint32_t i = 0; i < head->n_tokens; i++, at += 4)
        kvc_le_put(at, head->tokens[i], 4);
    kvc_le_put(bytes + 64, head->schema_bytes, 4);
    kvc_le_put(bytes + 68, head->tail_bytes, 4);
    if (head->schema_bytes > 0)
        memcpy(at, head->schema_msg, head->schema_bytes);
    if (head->tail_bytes > 0)
        memcpy(at + head->schema_bytes, head->tail, head->tail_bytes);
    kvc_le_put(bytes + SUM_OFF, kvc_value_sum(bytes, n), 8);
    bool good = write(arg, bytes, n);
    free(bytes);
    return good;
}

bool kvctl_file_put_value(kvctl_file_write *write, void *arg, const uint8_t *bytes,
                          uint32_t len_bytes)
{
    uint8_t record[RECORD_HEAD] = {0};
    if (bytes != NULL) {
        kvc_le_put(record, len_bytes, 4);
        kvc_le_put(record + 8, kvc_value_sum(bytes, len_bytes), 8);
    }
    return write(arg, record, sizeof(record)) && (bytes == NULL || write(arg, bytes, len_bytes));
}

bool kvctl_file_put_end(kvctl_file_write *write, void *arg, uint64_t n_values)
{
    uint8_t end[2 * MARK_BYTES];
    memcpy(end, END_MARK, MARK_BYTES);
    kvc_le_put(end + MARK_BYTES, n_values, 8);
    return write(arg, end, sizeof(end));
}
