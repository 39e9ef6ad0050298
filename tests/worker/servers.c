/*
 * servers.c: see servers.h.
 */
#include "servers.h"

void servers_start(servers *s, uint32_t n)
{
    memset(s, 0, sizeof(*s));
    for (; s->n < n; s->n++) {
        h_server_init(&s->h[s->n]);
        h_server_start(&s->h[s->n]);
        s->clients[s->n] = store_client(kvs_server_uri(s->h[s->n].server, 0));
    }
}

void servers_stop(servers *s)
{
    for (uint32_t i = 0; i < s->n; i++) {
        kvc_client_close(s->clients[i]);
        h_server_fini(&s->h[i]);
    }
}

void servers_use(servers *s, rig *r, uint32_t n)
{
    r->opts.client = NULL;
    r->opts.clients = n == 0 ? NULL : s->clients;
    r->opts.n_clients = n;
}

kvw_server_stats server_stats_of(const kvw_seq *seq, uint32_t server)
{
    kvw_server_stats stats = {.size_bytes = sizeof(stats)};
    assert_ok(kvw_seq_server_stats(seq, server, &stats));
    return stats;
}
