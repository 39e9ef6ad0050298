/*
 * gca_answer.c: runs the GCA decoder over a file of tokens, its memory in a worker and, with
 * --server, in a cachesvc. The body goes through the lower half and the encoder only; of the tail,
 * the logits are written. One thread; exit status 0 only if all went well.
 */
#include <getopt.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gca_model.h"
#include "kvc/client.h"

typedef struct options {
    const char *weights, *tokens, *out, *server, *backend;
    uint32_t n_tail;
} options;

typedef struct program {
    gca_model *model;
    kvc_client *client;
    kvw_worker *worker;
    kvw_seq *seq;
    gca_context *context;
    uint32_t *tokens;
    uint32_t n_chunks;
    float *logits; /* [n_tail, chunk, vocab] */
} program;

static const char usage[] =
    "Usage: gca_answer --weights FILE --tokens FILE --tail N --out FILE [--server URI]\n"
    "                  [--backend NAME]\n"
    "Runs the GCA decoder of worker/python/kvasir/gca over a context.\n"
    "  --weights FILE  model.safetensors, as the trainer writes it\n"
    "  --tokens FILE   u32 little-endian ids, whole chunks of 64, the landmark token last in each\n"
    "  --tail N        chunks at the end that run through the whole model\n"
    "  --out FILE      their logits, f32 little-endian [N, 64, vocab]\n"
    "  --server URI    cachesvc that keeps the chunks (default: they stay in memory)\n"
    "  --backend NAME  cpu, cuda or cuda:N (default cpu)\n";

static int fail(const char *what, kvc_status status, const char *detail)
{
    fprintf(stderr, "gca_answer: %s: %s %s\n", what, kvc_status_name(status), detail);
    return 1;
}

static int read_tokens(program *p, const options *o)
{
    uint32_t chunk = gca_model_sizes(p->model)->chunk;
    FILE *f = fopen(o->tokens, "rb");
    long end = 0;
    if (!f || fseek(f, 0, SEEK_END) != 0 || (end = ftell(f)) < 0 || fseek(f, 0, SEEK_SET) != 0 ||
        (unsigned long)end / sizeof(uint32_t) > 1u << 30) {
        if (f)
            (void)fclose(f);
        return fail(o->tokens, KVC_IO, "");
    }
    size_t n = (size_t)end / sizeof(uint32_t);
    p->tokens = malloc(n * sizeof(uint32_t) + 1);
    size_t got = p->tokens ? fread(p->tokens, sizeof(uint32_t), n, f) : 0;
    (void)fclose(f);
    p->n_chunks = (uint32_t)(n / chunk);
    if (got != n || n % chunk != 0 || o->n_tail == 0 || o->n_tail > p->n_chunks)
        return fail(o->tokens, KVC_INVALID, "must be whole chunks, and no fewer than the tail");
    return 0;
}

static int open_all(program *p, const options *o)
{
    kvc_status st = gca_model_open(o->weights, o->backend, &p->model);
    if (st != KVC_OK)
        return fail(o->weights, st, "");
    if (o->server) {
        const kvc_client_opts opts = {.size_bytes = sizeof(opts), .uris = o->server};
        if ((st = kvc_client_open(&opts, &p->client)) != KVC_OK)
            return fail(o->server, st, kvc_last_error());
    }
    kvw_opts opts = {.size_bytes = sizeof(opts), .model = "gca_answer", .client = p->client};
    gca_model_opts(p->model, &opts);
    uint32_t reused = 0;
    if ((st = kvw_open(&opts, &p->worker)) != KVC_OK ||
        (st = kvw_seq_create(p->worker, NULL, 0, &p->seq, &reused)) != KVC_OK)
        return fail("worker", st, kvw_last_error());
    if ((st = gca_context_open(p->model, p->seq, &p->context)) != KVC_OK)
        return fail("context", st, kvw_last_error());
    return 0;
}

static int run(program *p, const options *o)
{
    const gca_sizes *s = gca_model_sizes(p->model);
    uint32_t n_body = p->n_chunks - o->n_tail, at = 0, pass = gca_model_pass_chunks(p->model);
    size_t per_chunk = (size_t)s->chunk * s->vocab;
    kvc_status st = KVC_OK;
    p->logits = malloc(o->n_tail * per_chunk * sizeof(float));
    if (!p->logits)
        return fail("logits", KVC_NO_MEMORY, "");
    while (st == KVC_OK && at < n_body) {
        uint32_t n = n_body - at < pass ? n_body - at : pass;
        st = gca_context_body(p->context, p->tokens + (size_t)at * s->chunk, n);
        at += n;
    }
    if (st == KVC_OK && p->client)
        st = kvw_flush(p->seq, 0);
    for (uint32_t i = 0; st == KVC_OK && i < o->n_tail; i++) {
        st = gca_context_rows(p->context, p->tokens + (size_t)(n_body + i) * s->chunk, s->chunk,
                              p->logits + i * per_chunk);
    }
    return st == KVC_OK ? 0 : fail("forward", st, kvw_last_error());
}

static int report(program *p, const options *o)
{
    const gca_sizes *s = gca_model_sizes(p->model);
    size_t n = (size_t)o->n_tail * s->chunk * s->vocab;
    kvw_stats stats = {.size_bytes = sizeof(stats)};
    FILE *f = fopen(o->out, "wb");
    bool written = f && fwrite(p->logits, sizeof(float), n, f) == n;
    if (f && fclose(f) != 0)
        written = false;
    if (!written)
        return fail(o->out, KVC_IO, "");
    kvc_status st = kvw_seq_stats(p->seq, &stats);
    if (st != KVC_OK)
        return fail("statistics", st, kvw_last_error());
    printf("%u chunks, landmarks %" PRIu64 " bytes, chunks fetched %" PRIu64 " (%" PRIu64
           " bytes), retrievals %" PRIu64 "\n",
           p->n_chunks, stats.bytes_index, stats.misses / s->chunk, stats.bytes_fetched,
           stats.steps);
    return 0;
}

static void close_all(program *p)
{
    gca_context_close(p->context);
    kvw_seq_destroy(p->seq);
    kvw_close(p->worker);
    kvc_client_close(p->client);
    gca_model_close(p->model);
    free(p->tokens);
    free(p->logits);
}

static bool read_options(int argc, char **argv, options *o)
{
    static const struct option names[] = {
        {"weights", required_argument, NULL, 'w'}, {"tokens", required_argument, NULL, 't'},
        {"tail", required_argument, NULL, 'n'},    {"out", required_argument, NULL, 'o'},
        {"server", required_argument, NULL, 's'},  {"backend", required_argument, NULL, 'b'},
        {"help", no_argument, NULL, 'h'},          {0}};
    for (int c = 0; (c = getopt_long(argc, argv, "h", names, NULL)) != -1;) {
        switch (c) {
        case 'w':
            o->weights = optarg;
            break;
        case 't':
            o->tokens = optarg;
            break;
        case 'n':
            o->n_tail = (uint32_t)strtoul(optarg, NULL, 10);
            break;
        case 'o':
            o->out = optarg;
            break;
        case 's':
            o->server = optarg;
            break;
        case 'b':
            o->backend = optarg;
            break;
        case 'h':
            fputs(usage, stdout);
            exit(0);
        default:
            return false;
        }
    }
    return o->weights && o->tokens && o->out && optind == argc;
}

int main(int argc, char **argv)
{
    options o = {.backend = "cpu"};
    program p = {0};
    if (!read_options(argc, argv, &o)) {
        fputs(usage, stderr);
        return 2;
    }
    int failed = open_all(&p, &o) || read_tokens(&p, &o) || run(&p, &o) || report(&p, &o);
    close_all(&p);
    return failed;
}
