/*
 * load.c: see load.h.
 *
 * A block that is not shared belongs to one client, which alone puts and erases it; everybody reads
 * everything. The bytes of a value follow from its block and part, so no reader needs to know who
 * put it, or when.
 */
#include "load.h"

#define BATCH     8u  /* values a put */
#define PICKS     64u /* rows a fetch */
#define MAX_BYTES (BATCH * STORE_BLOCK_TOKENS * 4096u)
#define VERIFY    16u /* blocks a request of load_verify */
#define VERIFY_NS 60000000000ull

static uint32_t value_bytes(uint32_t part)
{
    return STORE_BLOCK_TOKENS * store_row_bytes[part];
}

static bool row_is_right(const uint8_t *row, uint32_t part, uint32_t token)
{
    for (uint32_t b = 0; b < store_row_bytes[part]; b++)
        if (row[b] != store_byte(part, token, b))
            return false;
    return true;
}

bool load_is_right(const uint8_t *bytes, uint32_t part, uint32_t block)
{
    for (uint32_t t = 0; t < STORE_BLOCK_TOKENS; t++)
        if (!row_is_right(bytes + (size_t)t * store_row_bytes[part], part,
                          block * STORE_BLOCK_TOKENS + t))
            return false;
    return true;
}

void load_fill(uint8_t *bytes, uint32_t part, uint32_t block)
{
    for (uint32_t t = 0; t < STORE_BLOCK_TOKENS; t++)
        for (uint32_t b = 0; b < store_row_bytes[part]; b++)
            *bytes++ = store_byte(part, block * STORE_BLOCK_TOKENS + t, b);
}

/* NOTHING and ERASED become UNKNOWN: somebody is about to put it. */
static void begin_put(atomic_uchar *owed)
{
    unsigned char now = LOAD_NOTHING;
    if (!atomic_compare_exchange_strong(owed, &now, LOAD_UNKNOWN) && now == LOAD_ERASED)
        atomic_store(owed, LOAD_UNKNOWN);
}

/* The i-th of the blocks that this client may put. */
static uint32_t own_block(const load_client *c, uint32_t i)
{
    uint32_t n_own = (c->load->n_blocks - LOAD_SHARED) / LOAD_CLIENTS;
    return LOAD_SHARED + i % n_own * LOAD_CLIENTS + c->number;
}

/* An error is no broken promise by itself; whether any may come is the test's to say. */
static void note_failure(load *l, const char *what, uint32_t part, kvc_status status)
{
    if (atomic_fetch_add(&l->counts.failed, 1) < l->failure_prints)
        print_error("%s of part %u: %s\n", what, part, kvc_status_name(status));
}

static void put_some(load_client *c)
{
    load_counts *counts = &c->load->counts;
    kvc_value values[BATCH];
    int8_t status[BATCH];
    kvc_op op;
    uint32_t n = 1 + (uint32_t)support_below(&c->random, BATCH);
    uint32_t first = (uint32_t)support_below(&c->random, c->load->n_blocks);
    uint32_t part = (uint32_t)support_below(&c->random, STORE_PARTS);
    bool shared = support_below(&c->random, 8) == 0;
    kvc_promise promise =
        support_below(&c->random, 2) == 0 ? KVC_PROMISE_MEMORY : KVC_PROMISE_DURABLE;
    kvc_op_init(&op, NULL, NULL);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t block = shared ? (first + i) % LOAD_SHARED : own_block(c, first + i);
        size_t off = (size_t)i * value_bytes(part);
        values[i] = (kvc_value){c->load->store->digests[block], part, value_bytes(part), off};
        load_fill(c->bytes + off, part, block);
        begin_put(&c->load->owed[block][part]);
    }
    kvc_status result =
        kvc_put(c->client, &c->load->store->schema, promise, values, n, c->region, status, 0, &op);
    if (result == KVC_OK)
        result = kvc_op_wait(&op, 0);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t block = shared ? (first + i) % LOAD_SHARED : own_block(c, first + i);
        if (result == KVC_OK && status[i] == KVC_AGAIN)
            continue; /* back-pressure */
        if (result != KVC_OK || (status[i] != KVC_OK && status[i] != KVC_EXISTS)) {
            note_failure(c->load, "put", part, result != KVC_OK ? result : status[i]);
            continue;
        }
        atomic_fetch_add(&counts->puts, 1);
        if (promise == KVC_PROMISE_DURABLE) {
            atomic_store(&c->load->owed[block][part], LOAD_DURABLE);
            atomic_fetch_add(&counts->durable, 1);
        }
    }
}

static void erase_some(load_client *c)
{
    kvc_digest digests[BATCH];
    kvc_op op;
    uint32_t first = (uint32_t)support_below(&c->random, c->load->n_blocks);
    uint32_t n = 1 + (uint32_t)support_below(&c->random, BATCH / 2);
    kvc_op_init(&op, NULL, NULL);
    for (uint32_t i = 0; i < n; i++) {
        digests[i] = c->load->store->digests[own_block(c, first + i)];
        for (uint32_t part = 0; part < STORE_PARTS; part++)
            atomic_store(&c->load->owed[own_block(c, first + i)][part], LOAD_UNKNOWN);
    }
    kvc_status result =
        kvc_erase(c->client, &c->load->store->schema, digests, n, NULL, 0, NULL, 0, &op);
    if (result == KVC_OK)
        result = kvc_op_wait(&op, 0);
    if (result != KVC_OK) {
        note_failure(c->load, "erase", 0, result);
        return;
    }
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t part = 0; part < STORE_PARTS; part++)
            atomic_store(&c->load->owed[own_block(c, first + i)][part], LOAD_ERASED);
    atomic_fetch_add(&c->load->counts.erased, n * STORE_PARTS);
}

/* Whether an answer NOT_FOUND breaks a promise that nobody but this client can take back. */
static bool is_owed(const load_client *c, uint32_t block, uint32_t part)
{
    bool own = block < LOAD_SHARED || block % LOAD_CLIENTS == c->number;
    return own && atomic_load(&c->load->owed[block][part]) == LOAD_DURABLE;
}

static void note_lost(const load_client *c, uint32_t part, uint32_t token)
{
    if (atomic_fetch_add(&c->load->counts.lost, 1) < c->load->prints)
        print_error("block %u part %u: a row of an acknowledged DURABLE value is not found\n",
                    token / STORE_BLOCK_TOKENS, part);
}

static void read_some(load_client *c)
{
    load_counts *counts = &c->load->counts;
    uint32_t picks[PICKS], part = (uint32_t)support_below(&c->random, STORE_PARTS);
    bool owed[PICKS];
    int8_t status[PICKS];
    kvc_op op;
    for (uint32_t i = 0; i < PICKS; i++) {
        picks[i] = (uint32_t)support_below(&c->random, c->load->n_blocks * STORE_BLOCK_TOKENS);
        owed[i] = is_owed(c, picks[i] / STORE_BLOCK_TOKENS, part);
    }
    kvc_pick_group group = {.context = c->context,
                            .part = part,
                            .row_bytes = store_row_bytes[part],
                            .n_picks = PICKS,
                            .picks = picks};
    kvc_op_init(&op, NULL, NULL);
    kvc_status result = kvc_fetch(c->client, &group, 1, c->region, status, NULL, 0, &op);
    if (result == KVC_OK)
        result = kvc_op_wait(&op, 0);
    atomic_fetch_add(&counts->reads, 1);
    if (result != KVC_OK) {
        note_failure(c->load, "fetch", part, result);
        return;
    }
    for (uint32_t i = 0; i < PICKS; i++) {
        const uint8_t *row = c->bytes + (size_t)i * store_row_bytes[part];
        if (status[i] == KVC_OK && !row_is_right(row, part, picks[i]))
            atomic_fetch_add(&counts->wrong, 1);
        else if (status[i] == KVC_NOT_FOUND && owed[i])
            note_lost(c, part, picks[i]);
        else if (status[i] != KVC_OK && status[i] != KVC_NOT_FOUND)
            note_failure(c->load, "row", part, status[i]);
    }
}

static void client_main(void *arg)
{
    load_client *c = arg;
    while (!atomic_load(&c->load->stop)) {
        uint64_t what = support_below(&c->random, 16);
        if (what == 0)
            erase_some(c);
        else if (what < 8)
            put_some(c);
        else
            read_some(c);
    }
}

void load_open(load *l, store *s, uint64_t seed)
{
    memset(l, 0, sizeof(*l));
    l->store = s;
    l->n_blocks = STORE_MAX_BLOCKS;
    for (uint32_t i = 0; i < LOAD_CLIENTS; i++) {
        load_client *c = &l->clients[i];
        c->load = l;
        c->number = i;
        c->random.state = seed * LOAD_CLIENTS + i;
        c->client = store_connect(s->tcp_uri);
        c->context = store_context(s, c->client, STORE_MAX_BLOCKS);
        c->bytes = malloc(MAX_BYTES);
        assert_non_null(c->bytes);
        kvc_region_desc desc = {sizeof(desc), c->bytes, MAX_BYTES, KVC_MEMORY_HOST, 0, NULL};
        assert_ok(kvc_region_register(c->client, &desc, &c->region));
    }
}

void load_begin(load *l)
{
    atomic_store(&l->stop, false);
    for (uint32_t i = 0; i < LOAD_CLIENTS; i++)
        assert_ok(
            kvc_thread_start(&l->clients[i].thread, "load-client", client_main, &l->clients[i]));
}

void load_end(load *l)
{
    atomic_store(&l->stop, true);
    for (uint32_t i = 0; i < LOAD_CLIENTS; i++)
        kvc_thread_join(&l->clients[i].thread);
}

/* Compares one answer with what is owed. */
static void judge(const load *l, uint32_t block, uint32_t part, int8_t status, const uint8_t *bytes,
                  load_found *found)
{
    load_owed owed = (load_owed)atomic_load(&l->owed[block][part]);
    bool wrong = status == KVC_OK && !load_is_right(bytes, part, block);
    bool lost = owed == LOAD_DURABLE && status != KVC_OK;
    bool back = status == KVC_OK && (owed == LOAD_ERASED || owed == LOAD_NOTHING);
    if ((wrong || lost || back) && found->wrong + found->lost + found->back < l->prints)
        print_error("block %u part %u: %s (status %s)\n", block, part,
                    wrong  ? "wrong bytes"
                    : lost ? "an acknowledged DURABLE value is lost"
                           : "an erased value is back",
                    kvc_status_name(status));
    found->there += status == KVC_OK;
    found->wrong += wrong;
    found->lost += lost;
    found->back += back;
}

static void verify_part(const load *l, uint32_t part, uint8_t *bytes, const kvc_region *region,
                        load_found *found)
{
    kvc_block_part where = {
        .part = part, .value_bytes = value_bytes(part), .stride_bytes = value_bytes(part)};
    int8_t status[VERIFY];
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    for (uint32_t first = 0; first < l->n_blocks; first += VERIFY) {
        kvc_status result =
            kvc_fetch_blocks(l->store->client, &l->store->schema, l->store->digests + first, VERIFY,
                             &where, 1, region, status, NULL, kvc_now_ns() + VERIFY_NS, &op);
        if (result == KVC_OK)
            result = kvc_op_wait(&op, 0);
        if (result != KVC_OK) /* as where the schema itself was lost */
            memset(status, (int8_t)result, sizeof(status));
        for (uint32_t i = 0; i < VERIFY; i++)
            judge(l, first + i, part, status[i], bytes + (size_t)i * value_bytes(part), found);
    }
}

load_found load_verify(load *l)
{
    load_found found = {0};
    size_t len = VERIFY * (size_t)value_bytes(0);
    uint8_t *bytes = malloc(len);
    kvc_region *region = NULL;
    kvc_region_desc desc = {sizeof(desc), bytes, len, KVC_MEMORY_HOST, 0, NULL};
    assert_non_null(bytes);
    assert_ok(kvc_region_register(l->store->client, &desc, &region));
    for (uint32_t part = 0; part < STORE_PARTS; part++)
        verify_part(l, part, bytes, region, &found);
    assert_ok(kvc_region_deregister(l->store->client, region));
    free(bytes);
    return found;
}

void load_close(load *l)
{
    for (uint32_t i = 0; i < LOAD_CLIENTS; i++) {
        load_client *c = &l->clients[i];
        assert_ok(kvc_region_deregister(c->client, c->region));
        kvc_context_close(c->context);
        kvc_client_close(c->client);
        free(c->bytes);
    }
}
