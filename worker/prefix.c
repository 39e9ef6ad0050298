/*
 * prefix.c: see prefix.h. A question to a server is one message, of as many digests as it takes;
 * the answers of all are awaited before any server is asked again, and nobody is asked for what
 * lies behind a block that is known to be lacking.
 */
#include "prefix.h"

#include <stdlib.h>

void kvwi_prefix_close(kvwi_prefix *p)
{
    free(p->servers);
    free(p->digests);
    free(p->blocks);
}

kvc_status kvwi_prefix_open(kvwi_prefix *p, kvw_seq *seq, uint32_t n_blocks)
{
    uint32_t n_servers = seq->worker->servers.n, at = 0;
    *p = (kvwi_prefix){.seq = seq};
    p->servers = calloc(n_servers, sizeof(*p->servers));
    p->digests = malloc((n_blocks + 1u) * sizeof(*p->digests));
    p->blocks = malloc((n_blocks + 1u) * sizeof(*p->blocks));
    if (p->servers == NULL || p->digests == NULL || p->blocks == NULL) {
        kvwi_prefix_close(p);
        (void)kvwi_fail(KVC_NO_MEMORY, "out of memory");
        return KVC_NO_MEMORY;
    }
    for (uint32_t s = 0; s < n_servers; s++) {
        kvwi_owned *own = &p->servers[s];
        own->digests = p->digests + at;
        own->blocks = p->blocks + at;
        for (uint32_t b = 0; b < n_blocks; b++) {
            if (seq->blocks[b].server == s) {
                own->digests[own->n] = seq->blocks[b].digest;
                own->blocks[own->n++] = b;
            }
        }
        at += own->n;
    }
    return KVC_OK;
}

/* Asks a server for its next blocks below `end`, at most what a message may name. */
static kvc_status ask(kvwi_prefix *p, uint32_t server, const uint32_t *parts, uint32_t n_parts,
                      uint32_t end)
{
    const kvw_worker *w = p->seq->worker;
    kvc_client *client = w->servers.all[server].client;
    kvwi_owned *own = &p->servers[server];
    uint32_t batch = kvc_client_limits(client)->max_digests;
    batch = batch == 0 ? KVC_MAX_DIGESTS : kvwi_min_u32(batch, KVC_MAX_DIGESTS);
    own->ask = 0;
    while (!own->ended && own->ask < batch && own->at + own->ask < own->n &&
           own->blocks[own->at + own->ask] < end) {
        own->ask++;
    }
    if (own->ask == 0) {
        return KVC_OK;
    }
    kvc_op_init(&own->op, NULL, NULL);
    kvc_status st = kvc_match(client, &w->schema, own->digests + own->at, own->ask, parts, n_parts,
                              &own->got, 0, &own->op);
    own->in_flight = st == KVC_OK;
    return st;
}

/* Takes an answer; *end_p sinks to the first block that is lacking. */
static kvc_status answer(kvwi_owned *own, uint32_t *end_p)
{
    if (!own->in_flight) {
        return KVC_OK;
    }
    kvc_status st = kvc_op_wait(&own->op, 0);
    own->in_flight = false;
    if (st != KVC_OK) {
        return st;
    }
    own->at += own->got;
    own->ended = own->got < own->ask;
    if (own->ended) {
        *end_p = kvwi_min_u32(*end_p, own->blocks[own->at]);
    }
    return KVC_OK;
}

/* One question to every server that has one left. *asked_p: whether there was any. */
static kvc_status ask_all(kvwi_prefix *p, const uint32_t *parts, uint32_t n_parts, uint32_t *end_p,
                          bool *asked_p)
{
    const kvw_worker *w = p->seq->worker;
    uint32_t end = *end_p, failed = 0;
    kvc_status first = KVC_OK;
    *asked_p = false;
    for (uint32_t s = 0; s < w->servers.n; s++) {
        kvc_status st = ask(p, s, parts, n_parts, end);
        *asked_p = *asked_p || p->servers[s].in_flight;
        failed = first == KVC_OK ? s : failed;
        first = first == KVC_OK ? st : first;
    }
    for (uint32_t s = 0; s < w->servers.n; s++) {
        kvc_status st = answer(&p->servers[s], end_p);
        failed = first == KVC_OK ? s : failed;
        first = first == KVC_OK ? st : first;
    }
    char server[KVWI_SERVER_TEXT];
    return first == KVC_OK ? KVC_OK
                           : kvwi_fail(first, "match: %s%s", kvc_last_error(),
                                       kvwi_server_text(w, failed, server));
}

kvc_status kvwi_prefix_match(kvwi_prefix *p, uint32_t n, const uint32_t *parts, uint32_t n_parts,
                             uint32_t *hits_p)
{
    kvc_status st = KVC_OK;
    for (uint32_t s = 0; s < p->seq->worker->servers.n; s++) {
        p->servers[s].at = 0;
        p->servers[s].ended = false;
    }
    *hits_p = n;
    for (bool asked = true; st == KVC_OK && asked;) {
        st = ask_all(p, parts, n_parts, hits_p, &asked);
    }
    return st;
}

kvc_status kvwi_contexts_begin(kvw_seq *seq, uint32_t n_blocks)
{
    const kvw_worker *w = seq->worker;
    kvwi_prefix p;
    kvc_status st = kvwi_prefix_open(&p, seq, n_blocks);
    if (st != KVC_OK) {
        return st;
    }
    for (uint32_t s = 0; st == KVC_OK && s < w->servers.n; s++) {
        char server[KVWI_SERVER_TEXT];
        st = kvc_context_open(w->servers.all[s].client, &w->schema, p.servers[s].digests,
                              p.servers[s].n, 0, 0, &seq->servers[s].context);
        if (st != KVC_OK) {
            st = kvwi_fail(st, "context: %s%s", kvc_last_error(), kvwi_server_text(w, s, server));
        }
    }
    kvwi_prefix_close(&p);
    return st;
}
