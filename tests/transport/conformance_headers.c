/*
 * conformance_headers.c: headers of many KiB, in both directions, with and without a payload.
 *
 * See conformance.h. What a transport does with a header must not hang on there being a payload,
 * nor on the header being small.
 */
#include "fixture.h"

#include <pthread.h>

#include "conformance.h"

static const kvc_request *sent_request;
static const kvc_reply *sent_reply;
static const char *request_diff;

/* Held while the server's end looks at what the test has set, so that it is through with it before
 * the test writes there again: what passes between the two within a transport, a sanitizer need not
 * see. */
static pthread_mutex_t looking = PTHREAD_MUTEX_INITIALIZER;

static void answer_as_set(fixture *f, kvt_call *call)
{
    kvt_slice slices[8];
    pthread_mutex_lock(&looking);
    const char *diff = sample_request_diff(sent_request, &call->req);
    if (diff != NULL)
        request_diff = diff;
    for (uint32_t i = 0; i < sent_reply->n_data; i++)
        slices[i] = counted_slice(f, sent_reply->data[i].iov_base, sent_reply->data[i].iov_len);
    fixture_reply(f, call, KVC_OK, NULL, 0, sent_reply, slices, sent_reply->n_data);
    pthread_mutex_unlock(&looking);
}

static void run_one(fixture *f, const kvc_request *req, const kvc_reply *want)
{
    job j;
    pthread_mutex_lock(&looking);
    sent_request = req;
    sent_reply = want;
    request_diff = NULL;
    pthread_mutex_unlock(&looking);
    job_init(&j, f, *req, PATIENCE_NS);
    j.want = want;
    kvc_status status = job_run(&j);
    pthread_mutex_lock(&looking);
    pthread_mutex_unlock(&looking);
    if (status != KVC_OK)
        fail_msg("%s, data of %llu and %llu bytes: %s: %s", kvc_method_name(req->method),
                 (unsigned long long)req->data_bytes, (unsigned long long)want->data_bytes,
                 kvc_status_name(j.status), j.xfer.detail);
    if (request_diff != NULL)
        fail_msg("%s: request field %s differs", kvc_method_name(req->method), request_diff);
    job_fini(&j);
}

static void match_many(fixture *f, uint32_t n, kvc_arena *arena)
{
    kvc_request req = sample_request(KVC_MATCH_PREFIX, 0, arena);
    kvc_reply want = sample_reply(KVC_MATCH_PREFIX, 0, arena);
    kvc_digest *digests = kvc_arena_alloc(arena, n * sizeof(*digests));
    uint8_t *tiers = kvc_arena_alloc(arena, n);
    for (uint32_t i = 0; i < n; i++)
        digests[i] = sample_digest(i);
    memset(tiers, want.u.match_prefix.tiers[0], n);
    req.u.match_prefix.n_digests = n;
    req.u.match_prefix.digests = digests;
    want.u.match_prefix.hits = want.u.match_prefix.n_tiers = n;
    want.u.match_prefix.tiers = tiers;
    run_one(f, &req, &want);
}

static void fetch_many(fixture *f, uint32_t n, size_t data_bytes, kvc_arena *arena)
{
    kvc_request req = sample_request(KVC_FETCH_ROWS, 0, arena);
    kvc_reply want = sample_reply(KVC_FETCH_ROWS, data_bytes, arena);
    uint32_t *picks = kvc_arena_alloc(arena, n * sizeof(*picks));
    kvc_missing_row *missing = kvc_arena_alloc(arena, n * sizeof(*missing));
    for (uint32_t i = 0; i < n; i++) {
        picks[i] = i * 7919;
        missing[i] = (kvc_missing_row){i, KVC_NOT_FOUND};
    }
    kvc_row_group group = {.context = 1, .n_picks = n, .picks = picks};
    req.u.fetch_rows.n_groups = 1;
    req.u.fetch_rows.groups = &group;
    want.u.fetch_rows.n_missing = n;
    want.u.fetch_rows.missing = missing;
    run_one(f, &req, &want);
}

static void put_many(fixture *f, uint32_t n, size_t data_bytes, kvc_arena *arena)
{
    kvc_request req = sample_request(KVC_PUT_BLOCKS, data_bytes, arena);
    kvc_reply want = sample_reply(KVC_PUT_BLOCKS, 0, arena);
    kvc_put_value *values = kvc_arena_alloc(arena, n * sizeof(*values));
    for (uint32_t i = 0; i < n; i++)
        values[i] = req.u.put_blocks.values[i % req.u.put_blocks.n_values];
    req.u.put_blocks.n_values = n;
    req.u.put_blocks.values = values;
    run_one(f, &req, &want);
}

void large_headers(void **state)
{
    (void)state;
    static const uint32_t counts[] = {1000, 4000, 4096, 5000, KVC_MAX_DIGESTS};
    static const size_t sizes[] = {0, 10, 5000, 300000};
    fixture f;
    fixture_open(&f, 1);
    fixture_handle(&f, answer_as_set);
    for (size_t c = 0; c < sizeof(counts) / sizeof(counts[0]); c++) {
        kvc_arena arena;
        kvc_arena_init(&arena, 64u << 20);
        match_many(&f, counts[c], &arena);
        for (size_t s = 0; s < sizeof(sizes) / sizeof(sizes[0]); s++) {
            fetch_many(&f, counts[c], sizes[s], &arena);
            put_many(&f, KVC_MAX_BATCH_VALUES / (uint32_t)(c + 1), sizes[s], &arena);
        }
        kvc_arena_reset(&arena);
    }
    fixture_close(&f);
}
