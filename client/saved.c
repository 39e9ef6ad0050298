/*
 * saved.c: contexts saved by name: put and get piece by piece, list, delete.
 *
 * Caller's threads, one message at a time. A body is one block of memory here, in the order of the
 * wire. Invariant: what is handed out is whole and of one generation.
 */
#include <endian.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "base/clock.h"
#include "internal.h"

#define TRIES 3u /* of a get that meets a replacement, of a put whose upload was forgotten */

/* ---- put ------------------------------------------------------------------------------------- */

static uint8_t *join(const kvc_saved_context *context, const kvc_digest *digests,
                     const uint32_t *ids, const void *tail, size_t tail_bytes, size_t *n_p)
{
    size_t digests_bytes = (size_t)context->n_blocks * KVC_DIGEST_BYTES;
    *n_p = digests_bytes + (size_t)context->n_ids * 4 + tail_bytes;
    uint8_t *body = malloc(*n_p + 1), *at = body;
    if (body == NULL)
        return NULL;
    if (digests_bytes > 0)
        memcpy(at, digests, digests_bytes);
    at += digests_bytes;
    for (uint32_t i = 0; i < context->n_ids; i++, at += 4) {
        uint32_t id = htole32(ids[i]);
        memcpy(at, &id, sizeof(id));
    }
    if (tail_bytes > 0)
        memcpy(at, tail, tail_bytes);
    return body;
}

typedef struct put_taken {
    uint64_t received, generation;
} put_taken;

static kvc_status take_put(void *arg, const kvc_reply *reply)
{
    *(put_taken *)arg = (put_taken){.received = reply->u.put_context.received,
                                    .generation = reply->u.put_context.generation};
    return KVC_OK;
}

/* One upload from its start; *at_p is how far it came. */
static kvc_status upload(kvc_client *client, kvc_request *req, const uint8_t *body, size_t n,
                         uint64_t deadline_ns, size_t *at_p, uint64_t *generation_p)
{
    size_t most = kvci_limits(client).max_message_bytes;
    *at_p = 0;
    do {
        size_t len = n - *at_p < most ? n - *at_p : most;
        struct iovec data = {.iov_base = (uint8_t *)(uintptr_t)body + *at_p, .iov_len = len};
        put_taken taken = {0};
        kvci_rpc_opts opts = {.deadline_ns = deadline_ns, .take = take_put, .take_arg = &taken};
        req->u.put_context.offset = *at_p;
        req->data = &data;
        req->n_data = len > 0 ? 1 : 0;
        req->data_bytes = len;
        kvc_status status = kvci_rpc(client, req, &opts);
        if (status != KVC_OK)
            return status;
        *at_p += len;
        if (taken.received != *at_p || (taken.generation != 0) != (*at_p == n))
            return kvci_fail(KVC_PROTOCOL, "saved put: the server has %llu bytes of %zu",
                             (unsigned long long)taken.received, *at_p);
        *generation_p = taken.generation;
    } while (*at_p < n);
    return KVC_OK;
}

kvc_status kvc_saved_put(kvc_client *client, const kvc_saved_context *context,
                         const kvc_digest *digests, const uint32_t *ids, const void *tail,
                         size_t tail_bytes, const kvc_saved_when *when, uint64_t deadline_ns,
                         uint64_t *generation_p)
{
    size_t n, at;
    uint64_t generation = 0;
    kvc_status status;
    kvc_request req = {.method = KVC_PUT_CONTEXT};
    req.u.put_context.context = *context;
    req.u.put_context.replace = when->replace;
    req.u.put_context.if_generation = when->if_generation;
    deadline_ns = kvci_deadline(client, deadline_ns);
    uint8_t *body = join(context, digests, ids, tail, tail_bytes, &n);
    if (body == NULL)
        return kvci_fail(KVC_NO_MEMORY, "saved put: no memory for %zu bytes", n);
    for (uint32_t tries = 0;; tries++) {
        uint64_t number;
        if (getrandom(&number, sizeof(number), GRND_NONBLOCK) != sizeof(number))
            number = kvc_wall_ns();
        req.u.put_context.upload = number | 1;
        status = upload(client, &req, body, n, deadline_ns, &at, &generation);
        /* NOT_FOUND on the way: the server was restarted. */
        if (status != KVC_NOT_FOUND || at == 0 || tries + 1 == TRIES)
            break;
    }
    free(body);
    if (generation_p != NULL)
        *generation_p = status == KVC_OK ? generation : 0;
    return status;
}

/* ---- get ------------------------------------------------------------------------------------- */

/* A kvc_saved and all that it points at. */
typedef struct loaded {
    kvc_saved saved; /* first */
    char name[KVC_MAX_NAME_BYTES + 1];
    uint32_t *parts;
    uint8_t *body;
    size_t got_bytes;
} loaded;

void kvc_saved_free(kvc_saved *saved)
{
    loaded *l = (loaded *)saved;
    if (l == NULL)
        return;
    free(l->parts);
    free(l->body);
    free(l);
}

/* The head of the first reply; its lengths must agree as far as they can without the schema. */
static kvc_status take_head(loaded *l, const kvc_saved_context *head)
{
    uint64_t fixed = (uint64_t)head->n_blocks * KVC_DIGEST_BYTES + (uint64_t)head->n_ids * 4;
    size_t parts_bytes = head->n_tail_parts * sizeof(uint32_t);
    if (head->generation == 0 || head->body_bytes < fixed || head->body_bytes > SIZE_MAX / 2)
        return KVC_PROTOCOL;
    l->saved.context = *head;
    l->parts = malloc(parts_bytes + 1);
    l->body = malloc(head->body_bytes + 1);
    if (l->parts == NULL || l->body == NULL)
        return KVC_NO_MEMORY;
    if (parts_bytes > 0)
        memcpy(l->parts, head->tail_parts, parts_bytes);
    memcpy(l->name, head->name, strlen(head->name) + 1); /* the wire has checked its length */
    l->saved.context.name = l->name;
    l->saved.context.tail_parts = l->parts;
    l->saved.tail_bytes = (size_t)(head->body_bytes - fixed);
    return KVC_OK;
}

static kvc_status take_piece(void *arg, const kvc_reply *reply)
{
    loaded *l = arg;
    const kvc_saved_context *head = &reply->u.get_context.context;
    kvc_status status = l->body == NULL ? take_head(l, head) : KVC_OK;
    if (status != KVC_OK)
        return status;
    if (head->generation != l->saved.context.generation || reply->data_bytes == 0 ||
        reply->data_bytes > l->saved.context.body_bytes - l->got_bytes)
        return KVC_PROTOCOL;
    for (uint32_t i = 0; i < reply->n_data; i++) {
        memcpy(l->body + l->got_bytes, reply->data[i].iov_base, reply->data[i].iov_len);
        l->got_bytes += reply->data[i].iov_len;
    }
    return KVC_OK;
}

/* Where the body's parts begin; malloc's alignment suits the digests and, after them, the ids. */
static void lay_out(loaded *l)
{
    const kvc_saved_context *c = &l->saved.context;
    size_t ids_off = (size_t)c->n_blocks * KVC_DIGEST_BYTES;
    uint32_t *ids = (uint32_t *)(void *)(l->body + ids_off);
    for (uint32_t i = 0; i < c->n_ids; i++)
        ids[i] = le32toh(ids[i]);
    l->saved.digests = (const kvc_digest *)(const void *)l->body;
    l->saved.ids = ids;
    l->saved.tail = l->body + ids_off + (size_t)c->n_ids * 4;
}

static kvc_status load(kvc_client *client, const char *name, uint64_t deadline_ns, loaded *l)
{
    kvc_request req = {.method = KVC_GET_CONTEXT, .u.get_context.name = name};
    kvci_rpc_opts opts = {.deadline_ns = deadline_ns, .take = take_piece, .take_arg = l};
    do {
        req.u.get_context.generation = l->saved.context.generation;
        req.u.get_context.offset = l->got_bytes;
        kvc_status status = kvci_rpc(client, &req, &opts);
        if (status != KVC_OK)
            return status;
    } while (l->got_bytes < l->saved.context.body_bytes);
    lay_out(l);
    return KVC_OK;
}

kvc_status kvc_saved_get(kvc_client *client, const char *name, uint64_t deadline_ns,
                         kvc_saved **saved_p)
{
    kvc_status status = KVC_NOT_FOUND;
    *saved_p = NULL;
    deadline_ns = kvci_deadline(client, deadline_ns);
    for (uint32_t tries = 0; tries < TRIES; tries++) {
        loaded *l = calloc(1, sizeof(*l));
        if (l == NULL)
            return kvci_fail(KVC_NO_MEMORY, "saved get: no memory");
        status = load(client, name, deadline_ns, l);
        bool replaced = status == KVC_NOT_FOUND && l->got_bytes > 0;
        if (status == KVC_OK)
            *saved_p = &l->saved;
        else
            kvc_saved_free(&l->saved);
        if (!replaced)
            break;
    }
    return status;
}

/* ---- list, delete ---------------------------------------------------------------------------- */

typedef struct page {
    kvc_saved_context *contexts; /* [n] */
    char (*names)[KVC_MAX_NAME_BYTES + 1];
    uint32_t n;
    bool more;
} page;

static kvc_status take_page(void *arg, const kvc_reply *reply)
{
    page *p = arg;
    uint32_t n = reply->u.list_contexts.n_contexts;
    p->n = n;
    p->more = reply->u.list_contexts.more;
    for (uint32_t i = 0; i < n; i++) {
        const kvc_saved_context *from = &reply->u.list_contexts.contexts[i];
        memcpy(p->names[i], from->name, strlen(from->name) + 1);
        p->contexts[i] = *from;
        p->contexts[i].name = p->names[i];
        p->contexts[i].tail_parts = NULL;
        p->contexts[i].n_tail_parts = 0;
    }
    return p->more && n == 0 ? KVC_PROTOCOL : KVC_OK;
}

kvc_status kvc_saved_list(kvc_client *client, uint64_t deadline_ns, kvc_saved_each *each, void *arg)
{
    char after[KVC_MAX_NAME_BYTES + 1] = "";
    kvc_status status = KVC_NO_MEMORY;
    page p = {.more = true};
    p.contexts = calloc(KVC_MAX_SAVED_PAGE, sizeof(*p.contexts));
    p.names = calloc(KVC_MAX_SAVED_PAGE, sizeof(*p.names));
    if (p.contexts == NULL || p.names == NULL)
        (void)kvci_fail(status, "saved list: no memory");
    else
        status = KVC_OK;
    deadline_ns = kvci_deadline(client, deadline_ns);
    while (status == KVC_OK && p.more) {
        kvc_request req = {.method = KVC_LIST_CONTEXTS, .u.list_contexts.after = after};
        kvci_rpc_opts opts = {.deadline_ns = deadline_ns, .take = take_page, .take_arg = &p};
        status = kvci_rpc(client, &req, &opts);
        for (uint32_t i = 0; status == KVC_OK && i < p.n; i++)
            if (!each(arg, &p.contexts[i]))
                goto done;
        if (status == KVC_OK && p.more)
            memcpy(after, p.names[p.n - 1], sizeof(after));
    }
done:
    free(p.contexts);
    free(p.names);
    return status;
}

kvc_status kvc_saved_delete(kvc_client *client, const char *name, uint64_t if_generation,
                            uint64_t deadline_ns)
{
    bool resent = false;
    kvc_request req = {.method = KVC_DELETE_CONTEXT};
    kvci_rpc_opts opts = {.deadline_ns = deadline_ns, .resent_p = &resent};
    req.u.delete_context.name = name;
    req.u.delete_context.if_generation = if_generation;
    kvc_status status = kvci_rpc(client, &req, &opts);
    /* An attempt whose answer was lost may have removed it. */
    return status == KVC_NOT_FOUND && resent ? KVC_OK : status;
}
