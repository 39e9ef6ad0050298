/*
 * gca_needles.c: passkeys in a context of any length, found by a trained GCA decoder whose memory
 * of it is in cachesvc; what deploy/quickstart --gca runs. The context's chunks (see gca_task.h) go
 * through the lower half and the encoder; then questions are asked in one conversation, token by
 * token where the model answers. One thread; exit status 0 only if all went well and at least 95 %
 * of the answers (two-hop ones only where the model has two groups) are right.
 */
#include <getopt.h>
#include <inttypes.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/digest.h"
#include "gca_model.h"
#include "gca_task.h"
#include "kvc/client.h"
#include "kvctl_progress.h"

enum { MAX_TOKENS = 1 << 26, MAX_VOCAB = 4096, MAX_SERVERS = 8, TAIL_TOKENS = 1 << 16 };

typedef struct demo {
    const char *weights, *backend, *servers[MAX_SERVERS];
    uint64_t n_tokens, seed, server_pids[MAX_SERVERS], n_keys, n_links, n_decoded;
    uint32_t n_servers, n_pids;
    gca_model *model;
    kvc_client *clients[MAX_SERVERS];
    kvw_worker *worker;
    kvw_seq *seq;
    gca_context *context;
    gca_task task;
    uint32_t tail[GCA_CHUNK]; /* the tail's chunk under way */
    uint32_t n_fed;           /* rows of it that the model has seen */
    uint64_t n_tail;          /* whole chunks of the tail */
    float *logits;            /* [chunk, vocab] */
    uint32_t asked[GCA_KINDS], right[GCA_KINDS];
    kvc_digest said; /* of every logit that an answer was read from */
    double fill_s, flush_s, decode_s;
    kvw_stats filled, answered, decoded;
} demo;

static const char usage[] =
    "Usage: gca_needles --weights FILE [--backend NAME] [--server URI] [--tokens N] [--seed N]\n"
    "                   [--keys N] [--links N] [--decode N] [--server-pid PID]\n"
    "Hides passkeys in random tokens and has a trained GCA decoder answer questions about them.\n"
    "  --weights FILE    safetensors of the decoder, f32 or bf16\n"
    "  --backend NAME    cpu, cuda or cuda:N: where the decoder and the retrieval run (default "
    "cpu)\n"
    "  --server URI      cachesvc that keeps the chunks (default: they stay in memory); given up "
    "to\n"
    "                    8 times, the chunks are spread over the servers\n"
    "  --tokens N        length of the context, up to 67108864 (default 1048576)\n"
    "  --seed N          chooses tokens, needles and their places (default 1)\n"
    "  --keys N          passkeys with a name, besides the one without (default 32, at most 128)\n"
    "  --links N         names that lead to another's name: two hops (default 16, at most --keys)\n"
    "  --decode N        tokens to write on after the answers, for the timing (default 512)\n"
    "  --server-pid PID  process of cachesvc, to report its memory; of several, their sum\n";

static int fail(const char *what, kvc_status status, const char *detail)
{
    fprintf(stderr, "gca_needles: %s: %s %s\n", what, kvc_status_name(status), detail);
    return 1;
}

static int open_all(demo *d)
{
    kvc_status st = gca_model_open(d->weights, d->backend, &d->model);
    if (st != KVC_OK)
        return fail(st == KVC_UNSUPPORTED ? d->backend : d->weights, st, "");
    const gca_sizes *s = gca_model_sizes(d->model);
    if (s->vocab != 256 || s->chunk != GCA_CHUNK)
        return fail(d->weights, KVC_INVALID, "is of another task");
    for (uint32_t i = 0; i < d->n_servers; i++) {
        const kvc_client_opts opts = {.size_bytes = sizeof(opts), .uris = d->servers[i]};
        if ((st = kvc_client_open(&opts, &d->clients[i])) != KVC_OK)
            return fail(d->servers[i], st, kvc_last_error());
    }
    kvw_opts opts = {.size_bytes = sizeof(opts),
                     .model = "gca_needles",
                     .clients = d->n_servers == 0 ? NULL : d->clients,
                     .n_clients = d->n_servers};
    gca_model_opts(d->model, &opts);
    opts.fetch_timeout_ns = 60000000000u;
    opts.max_tokens = (uint32_t)d->n_tokens + TAIL_TOKENS;
    uint32_t reused = 0;
    if ((st = kvw_open(&opts, &d->worker)) != KVC_OK ||
        (st = kvw_seq_create(d->worker, NULL, 0, &d->seq, &reused)) != KVC_OK)
        return fail("worker", st, kvw_last_error());
    if ((st = gca_context_open(d->model, d->seq, &d->context)) != KVC_OK)
        return fail("context", st, kvw_last_error());
    d->logits = malloc(sizeof(float) * s->chunk * s->vocab);
    return d->logits ? 0 : fail("logits", KVC_NO_MEMORY, "");
}

static kvc_status fill(demo *d)
{
    uint32_t pass = gca_model_pass_chunks(d->model);
    uint32_t *tokens = malloc(sizeof(*tokens) * pass * GCA_CHUNK);
    uint64_t start_ns = kvc_now_ns(), at = 0;
    kvctl_progress *bar = kvctl_progress_start("reading", d->n_tokens, "tokens");
    kvc_status st = tokens ? KVC_OK : KVC_NO_MEMORY;
    while (st == KVC_OK && at < d->task.n_body) {
        uint64_t left = d->task.n_body - at;
        uint32_t n = left < pass ? (uint32_t)left : pass;
        for (uint32_t i = 0; i < n; i++)
            gca_task_chunk(&d->task, at + i, tokens + i * GCA_CHUNK);
        st = gca_context_body(d->context, tokens, n);
        kvctl_progress_set(bar, (at += n) * GCA_CHUNK);
    }
    free(tokens);
    d->fill_s = (double)(kvc_now_ns() - start_ns) / 1e9;
    if (st == KVC_OK && d->n_servers != 0)
        st = kvw_flush(d->seq, 0);
    kvctl_progress_stop(bar);
    d->flush_s = (double)(kvc_now_ns() - start_ns) / 1e9;
    return st;
}

/* ---- the tail ---- */

/* The model sees the chunk's rows up to `end`; logits are those of the rows that it had not seen.
 */
static kvc_status feed(demo *d, uint32_t end)
{
    kvc_status st = gca_context_rows(d->context, d->tail + d->n_fed, end - d->n_fed, d->logits);
    d->n_fed = end;
    if (st == KVC_OK && end == GCA_CHUNK) {
        d->n_fed = 0;
        gca_task_tail(&d->task, ++d->n_tail, d->tail);
    }
    return st;
}

/* The rest of the chunk, with a question in it. */
static kvc_status feed_question(demo *d, const uint32_t *text, uint32_t n)
{
    gca_task_ask(&d->task, d->n_tail, text, n, d->tail);
    return feed(d, GCA_CHUNK);
}

/* The model's next token after the last row that it saw, by its largest logit. */
static kvc_status next_token(demo *d, uint32_t *token_p)
{
    uint32_t vocab = gca_model_sizes(d->model)->vocab, best = 0;
    for (uint32_t i = 1; i < vocab; i++)
        best = d->logits[i] > d->logits[best] ? i : best;
    *token_p = best;
    const kvc_digest before = d->said;
    unsigned char both[sizeof(before) + 256 * sizeof(float)];
    memcpy(both, &before, sizeof(before));
    memcpy(both + sizeof(before), d->logits, 256 * sizeof(float));
    return kvc_sha256(both, sizeof(both), &d->said);
}

static kvc_status ask(demo *d, const gca_question *q)
{
    uint32_t again[5], n_right = 0;
    kvc_status st = feed_question(d, q->text, q->n_text);
    if (st == KVC_OK && q->kind == GCA_TWOHOP) {
        memcpy(again, q->text, 3 * sizeof(*again));
        again[3] = again[4] = GCA_HOP;
        st = feed_question(d, again, 5);
    }
    d->tail[0] = GCA_VAL;
    for (uint32_t i = 0; st == KVC_OK && i < GCA_VALUE; i++) {
        st = feed(d, i + 1);
        if (st == KVC_OK)
            st = next_token(d, &d->tail[i + 1]);
        n_right += st == KVC_OK && d->tail[i + 1] == q->answer[i];
    }
    d->asked[q->kind]++;
    d->right[q->kind] += n_right == GCA_VALUE;
    return st;
}

/* The model writes on by itself, landmarks where they belong. */
static kvc_status decode(demo *d)
{
    uint64_t start_ns = kvc_now_ns();
    kvc_status st = KVC_OK;
    for (uint64_t i = 0; st == KVC_OK && i < d->n_decoded; i++) {
        uint32_t at = d->n_fed;
        st = feed(d, at + 1);
        if (st == KVC_OK && at + 2 < GCA_CHUNK)
            st = next_token(d, &d->tail[at + 1]);
    }
    d->decode_s = (double)(kvc_now_ns() - start_ns) / 1e9;
    return st;
}

static kvc_status answer_all(demo *d)
{
    gca_question *questions = calloc(d->task.n_needles, sizeof(*questions));
    if (!questions)
        return KVC_NO_MEMORY;
    gca_task_questions(&d->task, questions);
    gca_task_tail(&d->task, 0, d->tail);
    kvctl_progress *bar = kvctl_progress_start("answering", d->task.n_needles, "questions");
    kvc_status st = KVC_OK;
    for (uint32_t i = 0; st == KVC_OK && i < d->task.n_needles; i++) {
        st = ask(d, &questions[i]);
        kvctl_progress_set(bar, i + 1);
    }
    kvctl_progress_stop(bar);
    free(questions);
    return st;
}

/* ---- the report ---- */

/* KiB of a line of /proc/PID/status (PID NULL: this process); 0 where it cannot be read. */
static uint64_t status_kib(uint64_t pid, const char *name)
{
    char path[64], line[256];
    uint64_t kib = 0;
    size_t n = strlen(name);
    if (pid)
        (void)snprintf(path, sizeof(path), "/proc/%" PRIu64 "/status", pid);
    else
        (void)snprintf(path, sizeof(path), "/proc/self/status");
    FILE *f = fopen(path, "r");
    while (f && fgets(line, sizeof(line), f)) {
        if (strncmp(line, name, n) == 0 && line[n] == ':')
            kib = strtoull(line + n + 1, NULL, 10);
    }
    if (f)
        (void)fclose(f);
    return kib;
}

static void report_memory(const demo *d)
{
    const gca_sizes *s = gca_model_sizes(d->model);
    double chunks = (double)d->task.n_body * s->chunk * s->hidden * 2 * sizeof(float);
    printf("memory      worker %.1f MB, %.1f of them landmarks",
           (double)(status_kib(0, "RssAnon") + status_kib(0, "RssShmem")) * 1024 / 1e6,
           (double)d->decoded.bytes_index / 1e6);
    uint64_t kib = 0;
    for (uint32_t i = 0; i < d->n_pids; i++)
        kib += status_kib(d->server_pids[i], "RssAnon") + status_kib(d->server_pids[i], "RssShmem");
    if (d->n_pids != 0)
        printf("; cachesvc %.1f MB", (double)kib * 1024 / 1e6);
    if (d->decoded.bytes_device != 0)
        printf("; GPU %.1f MB of them", (double)d->decoded.bytes_device / 1e6);
    printf("; the context's chunks are %.1f MB\n", chunks / 1e6);
}

static void report_answers(const demo *d, gca_kind kind, const char *name)
{
    double n = d->asked[kind], share = d->right[kind] / n, z2 = 1.96 * 1.96;
    if (d->asked[kind] == 0)
        return;
    double mid = (share + z2 / (2 * n)) / (1 + z2 / n);
    double half = 1.96 / (1 + z2 / n) * sqrt(share * (1 - share) / n + z2 / (4 * n * n));
    printf("%-11s %" PRIu32 " of %" PRIu32 " right (95 %% interval %.1f to %.1f %%)\n", name,
           d->right[kind], d->asked[kind], 100 * fmax(0, mid - half), 100 * fmin(1, mid + half));
}

/* What the store gave for one retrieval, which is for 64 tokens of one group. */
static void report_fetches(const demo *d, const char *name, const kvw_stats *before,
                           const kvw_stats *now)
{
    double n = (double)(now->steps - before->steps), rows = (double)(now->misses - before->misses);
    if (n <= 0)
        return;
    printf("%-11s %.1f of %u chunks fetched a group and 64 tokens, %.1f KB; from dram %.0f %%; "
           "scoring %.2f ms, waiting %.2f ms\n",
           name, rows / GCA_CHUNK / n, gca_model_sizes(d->model)->topk,
           (double)(now->bytes_fetched - before->bytes_fetched) / n / 1e3,
           rows > 0 ? 100 * (double)(now->rows_dram - before->rows_dram) / rows : 0,
           (double)(now->ns_select - before->ns_select) / 1e6 / n,
           (double)(now->ns_fetch_wait - before->ns_fetch_wait) / 1e6 / n);
}

static int report(const demo *d)
{
    char hex[KVC_DIGEST_HEX_BYTES];
    const gca_sizes *s = gca_model_sizes(d->model);
    printf("context     %" PRIu64 " tokens, %" PRIu64 " chunks; %u retrieval groups\n", d->n_tokens,
           d->task.n_body, s->groups);
    printf("read in     %.1f s (%.0f tokens/s), all in the store after %.1f s\n", d->fill_s,
           (double)d->n_tokens / d->fill_s, d->flush_s);
    report_answers(d, GCA_PASSKEY, "passkey");
    report_answers(d, GCA_MULTIKEY, "by name");
    report_answers(d, GCA_TWOHOP, "two hops");
    report_fetches(d, "answering", &d->filled, &d->answered);
    if (d->n_decoded) {
        report_fetches(d, "writing on", &d->answered, &d->decoded);
        printf("a token     %.2f ms over %" PRIu64 " tokens\n",
               d->decode_s * 1e3 / (double)d->n_decoded, d->n_decoded);
    }
    report_memory(d);
    kvc_digest_hex(&d->said, hex);
    printf("logits      %s\n", hex);
    uint32_t last = s->groups > 1 ? GCA_KINDS : GCA_TWOHOP, right = 0, asked = 0;
    for (uint32_t kind = 0; kind < last; kind++) {
        right += d->right[kind];
        asked += d->asked[kind];
    }
    return 100 * right >= 95 * asked ? 0 : 1;
}

static int run(demo *d)
{
    kvc_status st = gca_task_init(&d->task, d->seed, d->n_tokens / GCA_CHUNK, (uint32_t)d->n_keys,
                                  (uint32_t)d->n_links);
    if (st != KVC_OK)
        return fail("--tokens", st, "a needle takes 64, and links are no more than keys");
    if (open_all(d) != 0)
        return 1;
    d->filled.size_bytes = d->answered.size_bytes = d->decoded.size_bytes = sizeof(kvw_stats);
    if ((st = fill(d)) != KVC_OK || (st = kvw_seq_stats(d->seq, &d->filled)) != KVC_OK)
        return fail("read", st, kvw_last_error());
    if ((st = answer_all(d)) != KVC_OK || (st = kvw_seq_stats(d->seq, &d->answered)) != KVC_OK ||
        (st = decode(d)) != KVC_OK || (st = kvw_seq_stats(d->seq, &d->decoded)) != KVC_OK)
        return fail("answer", st, kvw_last_error());
    return report(d);
}

static bool number(const char *text, uint64_t most, uint64_t *out_p)
{
    char *end = NULL;
    unsigned long long x = strtoull(text, &end, 10);
    *out_p = x;
    return *text >= '0' && *text <= '9' && *end == 0 && x <= most;
}

static int bad_usage(void)
{
    fputs(usage, stderr);
    return 2;
}

static int parse(int argc, char **argv, demo *d)
{
    static const struct option names[] = {{"weights", required_argument, NULL, 'w'},
                                          {"server", required_argument, NULL, 's'},
                                          {"backend", required_argument, NULL, 'b'},
                                          {"tokens", required_argument, NULL, 't'},
                                          {"seed", required_argument, NULL, 'r'},
                                          {"keys", required_argument, NULL, 'k'},
                                          {"links", required_argument, NULL, 'l'},
                                          {"decode", required_argument, NULL, 'd'},
                                          {"server-pid", required_argument, NULL, 'p'},
                                          {"help", no_argument, NULL, 'h'},
                                          {0}};
    for (int c = 0; (c = getopt_long(argc, argv, "h", names, NULL)) != -1;) {
        if (c == 'p' && d->n_pids == MAX_SERVERS)
            return bad_usage();
        uint64_t *x = c == 't'   ? &d->n_tokens
                      : c == 'r' ? &d->seed
                      : c == 'k' ? &d->n_keys
                      : c == 'l' ? &d->n_links
                      : c == 'd' ? &d->n_decoded
                      : c == 'p' ? &d->server_pids[d->n_pids]
                                 : NULL;
        uint64_t most = c == 'k' || c == 'l' ? GCA_MAX_KEYS : MAX_TOKENS;
        if (x && !number(optarg, most, x))
            return bad_usage();
        d->n_pids += c == 'p';
        if (c == 'w')
            d->weights = optarg;
        else if (c == 'b')
            d->backend = optarg;
        else if (c == 's' && d->n_servers < MAX_SERVERS)
            d->servers[d->n_servers++] = optarg;
        else if (c == 'h')
            return fputs(usage, stdout) < 0;
        else if (!x)
            return bad_usage();
    }
    return d->weights && optind == argc ? -1 : bad_usage();
}

int main(int argc, char **argv)
{
    demo d = {.backend = "cpu",
              .n_tokens = 1 << 20,
              .seed = 1,
              .n_keys = 32,
              .n_links = 16,
              .n_decoded = 512};
    int result = parse(argc, argv, &d);
    if (result >= 0)
        return result;
    result = run(&d);
    gca_context_close(d.context);
    kvw_seq_destroy(d.seq);
    kvw_close(d.worker);
    for (uint32_t i = 0; i < d.n_servers; i++)
        kvc_client_close(d.clients[i]);
    gca_model_close(d.model);
    free(d.logits);
    return result;
}
