/*
 * attend.c: AttendRows: checks, admission, rows from lmdb, the answer.
 *
 * Starts on a transport thread, which checks shapes against the parts and references the values.
 * Rows that are only in lmdb are read by the disk threads as for a fetch; then the request goes to
 * the attender's threads, which compute and answer. Invariants: a request has been counted in
 * n_calls before it references anything, and the queue of the threads has room for all of them, so
 * handing one over does not fail; no fetch waits for an attender's thread.
 */
#include "attend.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/assert.h"
#include "base/log.h"
#include "base/metrics.h"

#define COLD_PART 4u /* of max_inflight_bytes: the most that the cold rows of one call may take */

/* What the arithmetic takes for itself comes out of the same bytes as answers. */
static void *take_scratch(void *arg, size_t len_bytes)
{
    kvs_server *server = arg;
    kvs_buffer *buffer;
    if (len_bytes > UINT32_MAX ||
        kvs_buffer_get(&server->buffers, (uint32_t)len_bytes, &buffer) != KVC_OK)
        return NULL;
    return buffer->bytes;
}

static void give_scratch(void *arg, void *memory)
{
    (void)arg;
    kvs_buffer_release((char *)memory - offsetof(kvs_buffer, bytes));
}

kvc_status kvs_attend_open(kvs_server *server)
{
    uint64_t n_threads = server->settings.attend_threads;
    long n_cores = sysconf(_SC_NPROCESSORS_ONLN);
    if (!server->settings.attend_queue && server->settings.attend_gpu_bytes)
        KVC_LOG_WARN(SERVER, "attend_gpu_bytes is of no use: attend_queue is 0, so AttendRows is "
                             "not served");
    if (!server->settings.attend_queue)
        return KVC_OK;
    if (!n_threads)
        n_threads = n_cores > 2 ? (uint64_t)n_cores / 2 : 1;
    kvs_attender *attender = calloc(1, sizeof(*attender));
    if (!attender)
        return KVC_NO_MEMORY;
    server->attender = attender;
    attender->max_calls = (uint32_t)(n_threads + server->settings.attend_queue);
    KVC_ASSERT(attender->max_calls <= KVS_DISK_QUEUE);
    /* Each call has one thread: calls run beside each other, not inside each other. */
    kvk_backend_opts opts = {
        .size_bytes = sizeof(opts), .n_threads = 1, .memory = {take_scratch, give_scratch, server}};
    kvc_status status = kvk_backend_open("cpu", &opts, &attender->backend);
    if (status == KVC_OK)
        status = kvs_disk_create("attend", (uint32_t)n_threads, &attender->threads);
    if (status != KVC_OK) {
        KVC_LOG_ERROR(SERVER, "the threads of AttendRows do not start: %s",
                      kvc_status_name(status));
        return status; /* closed with the server */
    }
    KVC_LOG_INFO(SERVER, "attention beside the data: %llu threads, %s",
                 (unsigned long long)n_threads, kvk_backend_isa(attender->backend));
    kvs_attend_gpu_open(server);
    return KVC_OK;
}

void kvs_attend_close(kvs_server *server)
{
    struct timespec nap = {.tv_nsec = 1000000};
    if (!server->attender)
        return;
    while (atomic_load(&server->attender->n_calls)) /* failed already, and not quite out of here */
        nanosleep(&nap, NULL);
    kvs_disk_destroy(server->attender->threads);
    kvs_attend_gpu_close(server);
    kvk_backend_close(server->attender->backend);
    free(server->attender);
    server->attender = NULL;
}

/* ---- what a group asks for ------------------------------------------------------------------- */

/* How the kernels call the part's rows; 0: they do not know them. */
static kvk_dtype row_dtype(const kvc_part *part)
{
    bool scaled = part->codec && strcmp(part->codec, KVC_CODEC_HEAD_SCALES) == 0;
    switch (part->dtype) {
    case KVC_DTYPE_F32:
    case KVC_DTYPE_F16:
    case KVC_DTYPE_BF16:
        return (kvk_dtype)part->dtype;
    case KVC_DTYPE_I8:
        return scaled ? KVK_I8_SCALED : (kvk_dtype)0;
    case KVC_DTYPE_E4M3:
        return scaled ? KVK_E4M3_SCALED : (kvk_dtype)0;
    case KVC_DTYPE_RAW:
        break;
    }
    return (kvk_dtype)0;
}

static uint32_t elem_bytes(kvc_dtype dtype)
{
    return dtype == KVC_DTYPE_F32 ? 4 : dtype == KVC_DTYPE_F16 || dtype == KVC_DTYPE_BF16 ? 2 : 0;
}

static const char *kind_name(kvc_part_kind kind)
{
    static const char *const names[] = {"",      "kv",       "latent", "indexer",
                                        "index", "chunk-kv", "state"};
    return kind >= KVC_PART_KV && kind <= KVC_PART_STATE ? names[kind] : "unknown";
}

/* Whether the part's rows are K and V that this server can attend over. */
static kvc_status check_part(kvt_call *call, uint32_t g, const kvc_part *part)
{
    kvk_dtype dtype = row_dtype(part);
    uint64_t k_bytes = part->kv_head_count > part->row_bytes
                           ? 0
                           : kvk_slice_bytes(dtype, part->kv_head_count, part->q_dim);
    if (part->kind != KVC_PART_KV && part->kind != KVC_PART_CHUNK_KV) {
        bool latent = part->kind == KVC_PART_LATENT;
        kvs_fail(call, latent ? KVC_UNSUPPORTED : KVC_INVALID,
                 latent ? "group %u: part %u is of kind %s, which is not attended over here"
                        : "group %u: part %u is of kind %s, which has no keys and values",
                 g, part->part, kind_name(part->kind));
        return latent ? KVC_UNSUPPORTED : KVC_INVALID;
    }
    if (!dtype || part->q_dim != part->v_dim || part->softcap < 0) {
        kvs_fail(call, KVC_UNSUPPORTED,
                 "group %u: part %u is not attended over here: its rows must be F32, F16 or BF16, "
                 "or I8 or E4M3 coded as head-scales, with v_dim as q_dim and no negative softcap",
                 g, part->part);
        return KVC_UNSUPPORTED;
    }
    if (!k_bytes || k_bytes != part->k_len_bytes || k_bytes != part->v_len_bytes) {
        kvs_fail(call, KVC_INVALID, "group %u: the rows of part %u have no keys and values", g,
                 part->part);
        return KVC_INVALID;
    }
    return KVC_OK;
}

static kvc_status check_query(kvt_call *call, uint32_t g, const kvc_part *part,
                              const kvs_attend_group *before)
{
    const kvc_attend_query *query = &call->req.u.fetch_rows.queries[g];
    const char *why = NULL;
    if (query->n_q_heads % part->kv_head_count)
        why = "n_q_heads is not a multiple of the part's kv_head_count";
    else if (query->ranks && (part->rope.type <= KVC_ROPE_NONE || part->rope.stored_rotated))
        why = "ranks, but the part's keys are not to be rotated";
    else if (query->q_positions && part->rope.type <= KVC_ROPE_NONE)
        why = "q_positions, but the part has no rotary embedding";
    else if ((query->ranks || query->q_positions) && part->q_dim % 2)
        why = "ranks or q_positions, but q_dim is odd";
    else if (query->same_q && before &&
             (query->n_q != before->query->n_q || query->n_q_heads != before->query->n_q_heads ||
              query->q_dtype != before->query->q_dtype || part->q_dim != before->dim))
        why = "same_q, but the group before has queries of another shape";
    if (!why)
        return KVC_OK;
    kvs_fail(call, KVC_INVALID, "group %u, part %u: %s", g, part->part, why);
    return KVC_INVALID;
}

static kvs_attend_group group_of(const kvs_attend *attend, uint32_t g, const kvc_part *part)
{
    const kvc_request *req = &attend->fetch.call->req;
    const kvc_attend_query *query = &req->u.fetch_rows.queries[g];
    size_t n = (size_t)query->n_q * query->n_q_heads;
    double scale = part->attention_scale;
    return (kvs_attend_group){
        .query = query,
        .ranks = query->ranks,
        .first_pick = attend->n_looked,
        .n_picks = req->u.fetch_rows.groups[g].n_picks,
        .kv_heads = part->kv_head_count,
        .dim = part->q_dim,
        .row_bytes = part->row_bytes,
        .k_off_bytes = part->k_off_bytes,
        .v_off_bytes = part->v_off_bytes,
        .dtype = row_dtype(part),
        .rope = part->rope,
        .scale = (float)(scale != 0 ? scale : 1 / sqrt((double)part->q_dim)),
        .softcap = (float)part->softcap,
        .q_bytes = query->same_q ? 0 : n * part->q_dim * elem_bytes(query->q_dtype),
        .o_bytes = n * part->q_dim * elem_bytes(query->o_dtype),
        .lse_bytes = n * sizeof(float),
    };
}

/* Once the last group is known: what came in, and what would go out. */
static kvc_status check_bytes(const kvs_attend *attend)
{
    kvt_call *call = attend->fetch.call;
    uint32_t max_bytes = attend->fetch.server->limits.max_message_bytes;
    if (call->req.data_bytes != attend->q_bytes) {
        kvs_fail(call, KVC_INVALID, "the queries have %llu bytes; the groups need %llu",
                 (unsigned long long)call->req.data_bytes, (unsigned long long)attend->q_bytes);
        return KVC_INVALID;
    }
    if (attend->out_bytes > max_bytes) {
        kvs_fail(call, KVC_INVALID, "the results would have %llu bytes; max_message_bytes is %u",
                 (unsigned long long)attend->out_bytes, max_bytes);
        return KVC_INVALID;
    }
    return KVC_OK;
}

static kvc_status look(kvs_fetch *fetch, uint32_t g, const kvc_part *part)
{
    _Static_assert((int)KVC_DTYPE_BF16 == (int)KVK_BF16 && (int)KVC_DTYPE_F16 == (int)KVK_F16 &&
                       (int)KVC_DTYPE_F32 == (int)KVK_F32,
                   "dtypes of the protocol and of the kernels have the same numbers");
    kvs_attend *attend = (kvs_attend *)fetch;
    kvc_status status = check_part(fetch->call, g, part);
    if (status == KVC_OK)
        status = check_query(fetch->call, g, part, g ? &attend->groups[g - 1] : NULL);
    if (status != KVC_OK)
        return status;
    kvs_attend_group group = group_of(attend, g, part);
    attend->groups[g] = group;
    attend->n_looked += group.n_picks;
    attend->q_bytes += group.q_bytes;
    attend->out_bytes += group.o_bytes + group.lse_bytes;
    return g + 1 == fetch->n_groups ? check_bytes(attend) : KVC_OK;
}

/* ---- the request ----------------------------------------------------------------------------- */

static void attend_free(kvs_attend *attend)
{
    atomic_fetch_sub(&attend->fetch.server->attender->n_calls, 1);
    kvs_fetch_fini(&attend->fetch);
    free(attend->groups);
    free(attend);
}

/* Values and buffers, before the call is answered: the server may close right after. */
static void let_go(kvs_attend *attend)
{
    if (attend->fetch.buffer)
        kvs_buffer_release(attend->fetch.buffer);
    attend->fetch.buffer = NULL;
    kvs_fetch_unref(&attend->fetch);
}

static void give_up(kvs_attend *attend, kvc_status status, const char *why)
{
    kvt_call *call = attend->fetch.call;
    let_go(attend);
    attend_free(attend);
    kvs_fail(call, status, "%s", why);
}

static void answer(kvs_attend *attend, kvs_buffer *out)
{
    kvs_fetch *fetch = &attend->fetch;
    kvt_call *call = fetch->call;
    kvc_reply reply = {.method = KVC_ATTEND_ROWS};
    kvt_slice slice = {.base = out->bytes,
                       .len_bytes = attend->out_bytes,
                       .release = kvs_buffer_release,
                       .arg = out};
    kvs_fetch_count(fetch);
    KVC_COUNT_N(rows_attended, fetch->n_picks - fetch->rows_missing);
    reply.u.fetch_rows.rows_gpu = fetch->rows_gpu;
    reply.u.fetch_rows.rows_dram = fetch->rows_dram;
    reply.u.fetch_rows.rows_lmdb = fetch->rows_lmdb;
    if (!kvs_gather_missing(fetch, &reply.u.fetch_rows.missing, &reply.u.fetch_rows.n_missing)) {
        kvs_buffer_release(out);
        give_up(attend, KVC_NO_MEMORY, "no memory for the list of missing rows");
        return;
    }
    uint32_t n_slices = attend->out_bytes ? 1 : 0;
    if (!n_slices)
        kvs_buffer_release(out);
    let_go(attend);
    attend_free(attend);
    kvs_answer(call, &reply, &slice, n_slices);
}

static void compute_run(kvs_job *job)
{
    kvs_attend *attend = (kvs_attend *)((char *)job - offsetof(kvs_attend, job));
    kvs_buffer *out = NULL;
    kvc_status status = kvs_given_up(attend->fetch.call);
    if (status != KVC_OK) {
        give_up(attend, status, "nobody waited any more when a thread was free to attend");
        return;
    }
    status = kvs_buffer_get(&attend->fetch.server->buffers, (uint32_t)attend->out_bytes, &out);
    if (status != KVC_OK) {
        give_up(attend, KVC_AGAIN, "every reply buffer is in use");
        return;
    }
    status = kvs_attend_compute(attend, out->bytes);
    if (status == KVC_OK) {
        answer(attend, out);
        return;
    }
    kvs_buffer_release(out);
    give_up(attend, status,
            status == KVC_NO_MEMORY ? "no memory to attend"
            : status == KVC_AGAIN   ? "the buffers are in use: none is left to attend with"
            : status == KVC_INVALID ? "these queries cannot be attended with"
                                    : "nobody waited any more before the last group");
}

static void hand_over(kvs_fetch *fetch)
{
    kvs_attend *attend = (kvs_attend *)fetch;
    attend->job.run = compute_run;
    if (kvs_disk_submit(fetch->server->attender->threads, &attend->job) != KVC_OK)
        give_up(attend, KVC_CLOSED, "the server is closing");
}

/* Places for the rows that are only in lmdb, value by value; what does not fit is left out. */
static uint32_t place_cold(kvs_attend *attend)
{
    kvs_fetch *fetch = &attend->fetch;
    uint64_t max_bytes = fetch->server->settings.max_inflight_bytes / COLD_PART;
    uint32_t n_kept = 0, off = 0;
    if (max_bytes > KVS_ATTEND_COLD_BYTES)
        max_bytes = KVS_ATTEND_COLD_BYTES;
    for (uint32_t i = 0; i < fetch->n_lmdb; i++) {
        uint32_t r = fetch->lmdb_reads[i], row_bytes = kvs_fetch_row_bytes(fetch, r);
        if (fetch->extra[r].device) /* a copy in the gpu tier is attended over there */
            continue;
        if (off + (uint64_t)fetch->reads[r].n_rows * row_bytes > max_bytes) {
            fetch->extra[r].status = KVC_AGAIN;
            continue;
        }
        for (uint32_t p = fetch->extra[r].first_pick; p != KVS_NO_READ; p = fetch->pick_next[p]) {
            fetch->pick_off[p] = off;
            off += row_bytes;
        }
        fetch->lmdb_reads[n_kept++] = r;
    }
    fetch->n_lmdb = n_kept;
    return off;
}

static void read_cold(kvs_attend *attend)
{
    kvs_fetch *fetch = &attend->fetch;
    uint32_t bytes = place_cold(attend);
    if (!fetch->n_lmdb) {
        hand_over(fetch);
        return;
    }
    if (kvs_buffer_get(&fetch->server->buffers, bytes, &fetch->buffer) != KVC_OK)
        give_up(attend, KVC_AGAIN, "there is no memory for the rows of lmdb");
    else if (kvs_fetch_read_cold(fetch) != KVC_OK)
        give_up(attend, KVC_AGAIN, "the disk threads have too much to do");
}

/* Takes one of the places; false: the call has been failed. */
static bool admit(kvs_attender *attender, kvt_call *call)
{
    if (!attender) {
        kvs_fail(call, KVC_UNSUPPORTED, "this server does not attend: its attend_queue is 0");
        return false;
    }
    if (atomic_fetch_add(&attender->n_calls, 1) < attender->max_calls)
        return true;
    atomic_fetch_sub(&attender->n_calls, 1);
    KVC_COUNT(attends_refused);
    kvs_fail(call, KVC_AGAIN, "%u calls are attended or wait for it, as many as may (attend_queue)",
             attender->max_calls);
    return false;
}

void kvs_on_attend_rows(kvs_server *server, kvt_call *call, const kvc_digest *tenant)
{
    uint32_t n_groups = call->req.u.fetch_rows.n_groups;
    if (!admit(server->attender, call))
        return;
    kvs_attend *attend = calloc(1, sizeof(*attend));
    kvs_attend_group *groups = calloc(n_groups ? n_groups : 1, sizeof(*groups));
    if (!attend || !groups || n_groups == 0) {
        free(attend);
        free(groups);
        atomic_fetch_sub(&server->attender->n_calls, 1);
        if (n_groups)
            kvs_fail(call, KVC_NO_MEMORY, "no memory");
        else
            kvs_fail(call, KVC_INVALID, "there is no group to attend over");
        return;
    }
    attend->groups = groups;
    attend->fetch.server = server;
    attend->fetch.call = call;
    attend->fetch.tenant = tenant;
    attend->fetch.look = look;
    attend->fetch.resume = hand_over;
    if (kvs_fetch_plan(&attend->fetch) != KVC_OK) {
        attend_free(attend);
        return;
    }
    kvs_attend_gpu_choose(attend);
    read_cold(attend);
}
