/*
 * admission_record.c: the day's count in lmdb's meta records; see admission_record.h.
 *
 * Before a write goes to lmdb the record covers it, or all of the budget, and is synced. It covers
 * a 64th of the budget more than was spent when it was written, so that few writes wait for one: a
 * process that dies takes the day up with that much less than is left of it at most, and never with
 * more. Such an end costs up to a 64th of the budget, the next one of that day half as much, and so
 * on: processes that die again and again do not use the day up.
 */
#include "admission_record.h"

#include <stdlib.h>

#include "base/clock.h"
#include "base/le.h"
#include "base/log.h"

#define NAME         "admission/day"
#define RECORD_BYTES 24u
#define OLD_BYTES    16u /* of a server that did not count ends */

static bool has_budget(const kvs_server *server)
{
    return server->lmdb.ops && server->admission.budget_bytes > 0;
}

void kvs_admission_load(kvs_server *server)
{
    void *data;
    size_t len_bytes;
    if (!has_budget(server))
        return;
    kvc_status status = server->lmdb.ops->meta_get(server->lmdb.tier, NAME, &data, &len_bytes);
    if (status == KVC_OK && (len_bytes == RECORD_BYTES || len_bytes == OLD_BYTES)) {
        kvs_admission_day day = {.start_wall_ns = kvc_le_get(data, 8),
                                 .spent_bytes = kvc_le_get((uint8_t *)data + 8, 8)};
        if (len_bytes == RECORD_BYTES) {
            day.n_ends = (uint32_t)kvc_le_get((uint8_t *)data + 16, 4);
            day.exact = kvc_le_get((uint8_t *)data + 20, 4) != 0;
        }
        kvs_admission_take_up(&server->admission, &day, kvc_now_ns(), kvc_wall_ns());
    } else if (status != KVC_NOT_FOUND) {
        KVC_LOG_WARN(SERVER, "what was written to lmdb today is not known: %s",
                     status == KVC_OK ? "its record has another length" : kvc_status_name(status));
    }
    free(data);
}

void kvs_admission_save(kvs_server *server, bool over)
{
    kvs_admission_day day;
    uint8_t record[RECORD_BYTES];
    if (!has_budget(server) ||
        !kvs_admission_due(&server->admission, kvc_now_ns(), kvc_wall_ns(), over, &day))
        return;
    kvc_le_put(record, day.start_wall_ns, 8);
    kvc_le_put(record + 8, day.spent_bytes, 8);
    kvc_le_put(record + 16, day.n_ends, 4);
    kvc_le_put(record + 20, day.exact, 4);
    kvc_status status = server->lmdb.ops->meta_put(server->lmdb.tier, NAME, record, sizeof(record));
    if (status == KVC_OK)
        kvs_admission_kept(&server->admission, &day);
    else if (!server->admission.unkept)
        KVC_LOG_WARN(SERVER, "what was written to lmdb today cannot be written down: %s",
                     kvc_status_name(status));
    server->admission.unkept = status != KVC_OK;
}
