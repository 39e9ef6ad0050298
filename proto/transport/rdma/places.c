/*
 * places.c: where the rows of an answer go at the client, or its whole values: runs of neighbours.
 *
 * The client cuts its rooms into runs and sends them with the request; both ends cut the runs at
 * the rows that are missing, which have a place and no bytes, and, where the answer streams, into
 * its messages, whose items follow each other. Pure, any thread. What a run says is
 * the client's word: an address that is not its own is refused by its device.
 */
#include <stdlib.h>

#include "base/le.h"
#include "rdma_internal.h"

static uint32_t slot_of(const kvt_room *room, uint32_t i)
{
    return room->slots != NULL ? room->slots[i] : room->first_slot + i;
}

/* Appends n rows at addr to runs [n_runs]; the new number, 0 where there is no room. */
static uint32_t append(kvtr_run *runs, uint32_t n_runs, uint64_t addr, uint32_t n,
                       uint32_t row_bytes)
{
    kvtr_run *last = n_runs == 0 ? NULL : &runs[n_runs - 1];
    if (last != NULL && last->row_bytes == row_bytes &&
        last->addr + (uint64_t)last->n_rows * row_bytes == addr) {
        last->n_rows += n;
        return n_runs;
    }
    if (n_runs == KVTI_MAX_RUNS)
        return 0;
    runs[n_runs] = (kvtr_run){addr, n, row_bytes};
    return n_runs + 1;
}

uint32_t kvtr_rooms_runs(const kvt_room *rooms, uint32_t n_rooms, kvtr_run *runs_p)
{
    uint32_t n_runs = 0;
    for (uint32_t r = 0; r < n_rooms; r++) {
        const kvt_room *room = &rooms[r];
        uint32_t step;
        for (uint32_t i = 0; i < room->n; i += step) {
            uint64_t slot = slot_of(room, i);
            step = room->slots == NULL ? room->n : 1;
            n_runs = append(runs_p, n_runs, (uintptr_t)room->base + slot * room->row_bytes, step,
                            room->row_bytes);
            if (n_runs == 0)
                return 0;
        }
    }
    return n_runs;
}

void kvtr_runs_encode(const kvtr_run *runs, uint32_t n_runs, uint8_t *out_p)
{
    for (uint32_t i = 0; i < n_runs; i++, out_p += KVTI_RUN_BYTES) {
        kvc_le_put(out_p, runs[i].addr, 8);
        kvc_le_put(out_p + 8, runs[i].n_rows, 4);
        kvc_le_put(out_p + 12, runs[i].row_bytes, 4);
    }
}

void kvtr_runs_decode(const uint8_t *in, uint32_t n_runs, kvtr_run *runs_p)
{
    for (uint32_t i = 0; i < n_runs; i++, in += KVTI_RUN_BYTES)
        runs_p[i] = (kvtr_run){kvc_le_get(in, 8), (uint32_t)kvc_le_get(in + 8, 4),
                               (uint32_t)kvc_le_get(in + 12, 4)};
}

/* Appends rows begin .. end of a run. */
static void add_place(kvtr_place *places, uint32_t *n_p, const kvtr_run *run, uint64_t begin,
                      uint64_t end)
{
    if (begin < end && run->row_bytes > 0)
        places[(*n_p)++] =
            (kvtr_place){run->addr + begin * run->row_bytes, (end - begin) * run->row_bytes};
}

/* Items begin .. end - 1 of all that runs have, which is where missing ones leave a hole. */
static kvc_status cut(const kvtr_run *runs, uint32_t n_runs, uint64_t begin, uint64_t end,
                      const kvc_missing_row *missing, uint32_t n_missing, uint64_t data_bytes,
                      kvtr_place **places_p, uint32_t *n_p)
{
    uint64_t first = 0, bytes = 0;
    uint32_t n = 0, m = 0;
    kvtr_place *places = calloc((size_t)n_runs + n_missing + 1, sizeof(*places));
    if (places == NULL)
        return KVC_NO_MEMORY;
    for (uint32_t r = 0; r < n_runs; first += runs[r].n_rows, r++) {
        uint64_t at = begin > first ? begin : first, run_end = first + runs[r].n_rows;
        run_end = end < run_end ? end : run_end;
        for (; m < n_missing && missing[m].index >= at && missing[m].index < run_end; m++) {
            add_place(places, &n, &runs[r], at - first, missing[m].index - first);
            at = missing[m].index + UINT64_C(1);
        }
        if (at < run_end)
            add_place(places, &n, &runs[r], at - first, run_end - first);
    }
    for (uint32_t i = 0; i < n; i++)
        bytes += places[i].len_bytes;
    if (m == n_missing && bytes == data_bytes) {
        *n_p = n;
        *places_p = places;
        return KVC_OK;
    }
    free(places);
    return KVC_INVALID;
}

/* Those of a message's values that have no bytes, as rows have them. NULL: no memory. */
static kvc_missing_row *missing_values(const kvc_reply *reply, uint64_t first, uint32_t *n_p)
{
    uint32_t n = reply->u.fetch_blocks.n_values;
    kvc_missing_row *missing = calloc(n + 1u, sizeof(*missing));
    *n_p = 0;
    for (uint32_t i = 0; missing != NULL && i < n; i++) {
        if (reply->u.fetch_blocks.values[i].status != KVC_OK)
            missing[(*n_p)++].index = (uint32_t)(first + i);
    }
    return missing;
}

uint64_t kvtr_reply_items(kvc_method method, const kvc_reply *reply)
{
    if (method == KVC_FETCH_BLOCKS)
        return reply->u.fetch_blocks.n_values;
    return method == KVC_FETCH_ROWS ? UINT32_MAX : reply->u.fetch_rows.n_picks;
}

kvc_status kvtr_reply_cut(kvc_method method, const kvc_reply *reply, uint64_t first,
                          uint64_t data_bytes, const kvtr_run *runs, uint32_t n_runs,
                          kvtr_place **places_p, uint32_t *n_p)
{
    uint64_t end = first + kvtr_reply_items(method, reply);
    uint32_t n_missing = 0;
    *n_p = 0;
    *places_p = NULL;
    if (method != KVC_FETCH_BLOCKS)
        return cut(runs, n_runs, first, end, reply->u.fetch_rows.missing,
                   reply->u.fetch_rows.n_missing, data_bytes, places_p, n_p);
    kvc_missing_row *missing = missing_values(reply, first, &n_missing);
    if (missing == NULL)
        return KVC_NO_MEMORY;
    kvc_status status =
        cut(runs, n_runs, first, end, missing, n_missing, data_bytes, places_p, n_p);
    free(missing);
    return status;
}
