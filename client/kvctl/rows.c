/*
 * rows.c: kvctl rows: fetches the rows of tokens and prints or writes them.
 *
 * Rows come in batches, so memory is bounded however many are asked for; each batch is printed, or
 * written to the file, before the next is fetched.
 */
#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/sum.h"
#include "base/text.h"
#include "kvctl.h"
#include "kvctl_progress.h"
#include "rows.h"

#define BATCH_BYTES ((uint32_t)8 << 20)
#define MAX_LISTED  20u /* missing rows named one by one in text */
#define TTL_MS      60000u

/* What has come so far. */
typedef struct rows_total {
    kvc_fetch_info info;
    uint64_t fetch_ns;
    uint32_t n_listed;
} rows_total;

static void put_hex(const uint8_t *bytes, uint32_t n, char *text)
{
    static const char digits[] = "0123456789abcdef";
    for (uint32_t i = 0; i < n; i++) {
        text[2 * (size_t)i] = digits[bytes[i] >> 4];
        text[2 * (size_t)i + 1] = digits[bytes[i] & 15];
    }
    text[2 * (size_t)n] = '\0';
}

static void print_row(const rows_args *args, uint32_t pick, const uint8_t *row)
{
    bool hex = args->format == ROWS_HEX;
    if (args->globals->json) {
        kvctl_json_open(NULL, '{');
        kvctl_json_number("pick", pick);
    }
    char *text = malloc(2 * (size_t)args->row_bytes + 1);
    if (text == NULL)
        return;
    if (hex)
        put_hex(row, args->row_bytes, text);
    else
        (void)snprintf(text, 9, "%08x", kvc_row_sum(row, args->row_bytes));
    if (args->globals->json) {
        kvctl_json_text(hex ? "hex" : "sum", text);
        kvctl_json_close();
    } else {
        (void)printf("%u %s\n", pick, text);
    }
    free(text);
}

static void report_missing(const rows_args *args, uint32_t pick, kvc_status status,
                           rows_total *total)
{
    if (args->globals->json) {
        if (args->format == ROWS_SUMMARY)
            return;
        kvctl_json_open(NULL, '{');
        kvctl_json_number("pick", pick);
        kvctl_json_text("status", kvc_status_name(status));
        kvctl_json_close();
        return;
    }
    if (total->n_listed++ < MAX_LISTED)
        kvctl_error("token %u: %s", pick, kvc_status_name(status));
    else if (total->n_listed == MAX_LISTED + 1)
        kvctl_error("... and more");
}

/* Prints or writes one batch. False: the file cannot be written. */
static bool give_out(const rows_args *args, const uint32_t *picks, uint32_t n, const uint8_t *rows,
                     const int8_t *status, FILE *out, rows_total *total)
{
    for (uint32_t i = 0; i < n; i++) {
        if (status[i] != KVC_OK)
            report_missing(args, picks[i], (kvc_status)status[i], total);
        else if (args->format != ROWS_SUMMARY)
            print_row(args, picks[i], rows + (size_t)i * args->row_bytes);
    }
    /* Missing rows are zeros in the file, so that every row has its place. */
    if (out != NULL && fwrite(rows, args->row_bytes, n, out) != n) {
        kvctl_error("cannot write %s: %s", args->out_path, strerror(errno));
        return false;
    }
    return true;
}

static void add_info(rows_total *total, const kvc_fetch_info *info)
{
    total->info.rows_gpu += info->rows_gpu;
    total->info.rows_dram += info->rows_dram;
    total->info.rows_lmdb += info->rows_lmdb;
    total->info.rows_missing += info->rows_missing;
    total->info.requests += info->requests;
}

static kvc_status fetch_batch(const rows_args *args, kvc_client *client, kvc_context *context,
                              const kvc_region *region, const uint32_t *picks, uint32_t n,
                              int8_t *status, rows_total *total)
{
    kvc_pick_group group = {
        .context = context,
        .part = args->part,
        .row_bytes = args->row_bytes,
        .n_picks = n,
        .picks = picks,
    };
    kvc_op op;
    kvc_fetch_info info = {0};
    kvc_op_init(&op, NULL, NULL);
    uint64_t start_ns = kvc_now_ns();
    kvc_status fetched =
        kvc_fetch(client, &group, 1, region, status, &info, kvctl_deadline_ns(args->globals), &op);
    if (fetched == KVC_OK)
        fetched = kvc_op_wait(&op, 0);
    total->fetch_ns += kvc_now_ns() - start_ns;
    add_info(total, &info);
    return fetched;
}

static kvctl_exit fetch_all(const rows_args *args, kvc_client *client, kvc_context *context,
                            FILE *out, rows_total *total)
{
    uint32_t batch = BATCH_BYTES / args->row_bytes;
    uint8_t *rows = calloc(batch, args->row_bytes);
    int8_t *status = calloc(batch, 1);
    kvc_region *region = NULL;
    kvctl_exit result = KVCTL_FAILED;
    kvc_region_desc desc = {
        .size_bytes = sizeof(desc),
        .base = rows,
        .len_bytes = (size_t)batch * args->row_bytes,
        .kind = KVC_MEMORY_HOST,
    };
    kvctl_progress *progress = kvctl_progress_start("fetching", args->n_picks, "rows");
    if (rows == NULL || status == NULL || kvc_region_register(client, &desc, &region) != KVC_OK) {
        kvctl_error("memory is out");
        goto done;
    }
    for (uint32_t first = 0; first < args->n_picks; first += batch) {
        uint32_t n = args->n_picks - first < batch ? args->n_picks - first : batch;
        memset(rows, 0, (size_t)n * args->row_bytes);
        kvc_status fetched =
            fetch_batch(args, client, context, region, args->picks + first, n, status, total);
        if (fetched != KVC_OK) {
            result = kvctl_failed(fetched);
            goto done;
        }
        if (!give_out(args, args->picks + first, n, rows, status, out, total))
            goto done;
        kvctl_progress_set(progress, first + n);
    }
    result = total->info.rows_missing > 0 ? KVCTL_FAILED : KVCTL_OK;
done:
    kvctl_progress_stop(progress);
    (void)kvc_region_deregister(client, region);
    free(status);
    free(rows);
    return result;
}

static void print_total(const rows_args *args, const rows_total *total)
{
    char bytes[KVC_TEXT_BYTES], took[KVC_TEXT_BYTES];
    uint32_t found = args->n_picks - total->info.rows_missing;
    uint64_t n_bytes = (uint64_t)found * args->row_bytes;
    if (args->globals->json) {
        kvctl_json_number("rows", found);
        kvctl_json_number("missing", total->info.rows_missing);
        kvctl_json_number("bytes", n_bytes);
        kvctl_json_number("rows_gpu", total->info.rows_gpu);
        kvctl_json_number("rows_dram", total->info.rows_dram);
        kvctl_json_number("rows_lmdb", total->info.rows_lmdb);
        kvctl_json_number("requests", total->info.requests);
        kvctl_json_number("fetch_ns", total->fetch_ns);
        return;
    }
    FILE *stream = args->format == ROWS_SUMMARY ? stdout : stderr;
    (void)fprintf(stream, "%u rows, %s, of %u asked for: %u from dram, %u from lmdb, %u missing\n",
                  found, kvc_bytes_short(n_bytes, bytes), args->n_picks, total->info.rows_dram,
                  total->info.rows_lmdb, total->info.rows_missing);
    (void)fprintf(stream, "fetched in %s by %u requests: %.0f rows/s\n",
                  kvc_duration_short(total->fetch_ns, took), total->info.requests,
                  (double)found * 1e9 / (double)(total->fetch_ns + 1));
}

kvctl_exit rows_fetch(const rows_args *args)
{
    kvc_client *client = NULL;
    kvc_context *context = NULL;
    rows_total total = {0};
    FILE *out = args->out_path != NULL ? fopen(args->out_path, "we") : NULL;
    if (args->out_path != NULL && out == NULL) {
        kvctl_error("cannot open %s: %s", args->out_path, strerror(errno));
        return KVCTL_FAILED;
    }
    kvctl_exit result = kvctl_connect(args->globals, &client);
    if (result != KVCTL_OK)
        goto done;
    kvc_status opened =
        kvc_context_open(client, &args->schema.digest, args->digests, args->n_digests, TTL_MS,
                         kvctl_deadline_ns(args->globals), &context);
    if (opened != KVC_OK) {
        result = kvctl_failed(opened);
        goto done;
    }
    if (args->globals->json) {
        kvctl_json_open(NULL, '{');
        if (args->format != ROWS_SUMMARY)
            kvctl_json_open("data", '[');
    }
    result = fetch_all(args, client, context, out, &total);
    if (args->globals->json && args->format != ROWS_SUMMARY)
        kvctl_json_close();
    print_total(args, &total);
    if (args->globals->json)
        kvctl_json_close();
done:
    if (out != NULL && fclose(out) != 0) {
        kvctl_error("cannot write %s: %s", args->out_path, strerror(errno));
        result = KVCTL_FAILED;
    }
    kvc_context_close(context);
    kvc_client_close(client);
    return result;
}
