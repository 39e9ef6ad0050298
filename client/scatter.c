/*
 * scatter.c: the rows of a reply to their slots, one copy each.
 *
 * Pure, any thread. Rows arrive dense in request order over iovecs that know nothing of rows, so a
 * row may lie across several; missing rows take no bytes. Runs of rows whose slots follow each
 * other are copied in one piece.
 */
#include <string.h>

#include "internal.h"

/* After a failure nothing more is written to a GPU: the fetch has failed. */
static void copy(kvci_cursor *cur, uint8_t *dst, const uint8_t *src, size_t len_bytes)
{
    if (cur->dst == NULL || !kvci_region_on_gpu(cur->dst))
        memcpy(dst, src, len_bytes);
    else if (cur->status == KVC_OK &&
             cur->dst->gpu.copy_in(cur->dst->gpu.arg, dst, src, len_bytes) != KVC_OK)
        cur->status = KVC_DEVICE; /* as kvci_region_flush */
}

void kvci_copy_out(kvci_cursor *cur, uint8_t *dst, size_t len_bytes)
{
    while (len_bytes > 0) {
        const struct iovec *piece = &cur->iov[cur->i];
        size_t left_bytes = piece->iov_len - cur->off_bytes;
        size_t step_bytes = left_bytes < len_bytes ? left_bytes : len_bytes;
        if (step_bytes > 0)
            copy(cur, dst, (const uint8_t *)piece->iov_base + cur->off_bytes, step_bytes);
        dst += step_bytes;
        len_bytes -= step_bytes;
        cur->off_bytes += step_bytes;
        if (cur->off_bytes == piece->iov_len) {
            cur->i++;
            cur->off_bytes = 0;
        }
    }
}

void kvci_skip(kvci_cursor *cur, size_t len_bytes)
{
    while (len_bytes > 0) {
        size_t left_bytes = cur->iov[cur->i].iov_len - cur->off_bytes;
        size_t step_bytes = left_bytes < len_bytes ? left_bytes : len_bytes;
        len_bytes -= step_bytes;
        cur->off_bytes += step_bytes;
        if (cur->off_bytes == cur->iov[cur->i].iov_len) {
            cur->i++;
            cur->off_bytes = 0;
        }
    }
}

kvc_status kvci_check_missing(const kvci_seg *segs, uint32_t n_segs, const kvc_reply *reply,
                              uint64_t *bytes_p, const char **why_p)
{
    uint64_t bytes = 0, first = 0;
    uint32_t m = 0, n_missing = reply->u.fetch_rows.n_missing;
    const kvc_missing_row *missing = reply->u.fetch_rows.missing;
    for (uint32_t s = 0; s < n_segs; s++) {
        uint64_t end = first + segs[s].n;
        uint32_t gone = 0;
        for (; m < n_missing && missing[m].index < end; m++, gone++) {
            bool ascends = m == 0 || missing[m].index > missing[m - 1].index;
            if (!ascends || missing[m].status >= 0 || missing[m].status <= -KVC_STATUS_COUNT) {
                *why_p = "missing rows are not ascending or have no error status";
                return KVC_PROTOCOL;
            }
        }
        bytes += (uint64_t)(segs[s].n - gone) * segs[s].row_bytes;
        first = end;
    }
    if (m < n_missing) {
        *why_p = "a missing row's index is beyond the request";
        return KVC_PROTOCOL;
    }
    *bytes_p = bytes;
    return KVC_OK;
}

uint64_t kvci_iov_bytes(const struct iovec *iov, uint32_t n_iov)
{
    uint64_t sum_bytes = 0;
    for (uint32_t i = 0; i < n_iov; i++)
        sum_bytes += iov[i].iov_len;
    return sum_bytes;
}

void kvci_put_statuses(const kvc_reply *reply, int8_t *status, uint32_t n)
{
    memset(status, KVC_OK, n);
    for (uint32_t m = 0; m < reply->u.fetch_rows.n_missing; m++)
        status[reply->u.fetch_rows.missing[m].index] =
            (int8_t)reply->u.fetch_rows.missing[m].status;
}

static uint32_t slot_of(const kvci_seg *seg, uint32_t i)
{
    return seg->slots != NULL ? seg->slots[i] : seg->first_slot + i;
}

/* Copies rows i..end (none missing) of a segment in runs of neighbouring slots. */
static void copy_rows(const kvci_seg *seg, uint32_t i, uint32_t end, kvci_cursor *cur)
{
    while (i < end) {
        uint32_t slot = slot_of(seg, i), run = 1;
        while (i + run < end && slot_of(seg, i + run) == (uint64_t)slot + run)
            run++;
        kvci_copy_out(cur, seg->base + (size_t)slot * seg->row_bytes, (size_t)run * seg->row_bytes);
        i += run;
    }
}

static const char bad_length[] =
    "the rows' length does not fit the request (is row_bytes the part's?)";

static const char bad_copy[] = "rows could not be written to the GPU";

kvc_status kvci_take_placed(const kvc_region *dst, const kvci_seg *segs, uint32_t n_segs,
                            const kvc_reply *reply, int8_t *status, const char **why_p)
{
    uint64_t bytes = 0;
    uint32_t n_picks = 0;
    kvc_status checked = kvci_check_missing(segs, n_segs, reply, &bytes, why_p);
    if (checked != KVC_OK)
        return checked;
    *why_p = bad_length;
    if (bytes != reply->data_bytes)
        return KVC_PROTOCOL;
    for (uint32_t s = 0; s < n_segs; s++)
        n_picks += segs[s].n;
    if (status != NULL)
        kvci_put_statuses(reply, status, n_picks);
    *why_p = bad_copy;
    return kvci_region_flush(dst);
}

kvc_status kvci_scatter(const kvc_region *dst, const kvci_seg *segs, uint32_t n_segs,
                        const kvc_reply *reply, int8_t *status, const char **why_p)
{
    uint64_t bytes = 0;
    kvc_status checked = kvci_check_missing(segs, n_segs, reply, &bytes, why_p);
    if (checked != KVC_OK)
        return checked;
    if (bytes != reply->data_bytes || bytes != kvci_iov_bytes(reply->data, reply->n_data)) {
        *why_p = bad_length;
        return KVC_PROTOCOL;
    }
    kvci_cursor cur = {.iov = reply->data, .dst = dst};
    uint32_t first = 0, m = 0, n_missing = reply->u.fetch_rows.n_missing;
    const kvc_missing_row *missing = reply->u.fetch_rows.missing;
    for (uint32_t s = 0; s < n_segs; s++) {
        uint32_t i = 0;
        if (status != NULL)
            memset(status + first, KVC_OK, segs[s].n);
        for (; m < n_missing && missing[m].index - first < segs[s].n; m++) {
            uint32_t gone = missing[m].index - first;
            copy_rows(&segs[s], i, gone, &cur);
            if (status != NULL)
                status[missing[m].index] = (int8_t)missing[m].status;
            i = gone + 1;
        }
        copy_rows(&segs[s], i, segs[s].n, &cur);
        first += segs[s].n;
    }
    *why_p = bad_copy;
    return cur.status;
}
