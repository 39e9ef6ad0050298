/*
 * record_input.h: what an input of fuzz_records is, and a store of one record for those who read
 * and write such.
 *
 * Single thread. An input: kind, whether its sum or date is put right first, u16le length of the
 * record's name, the name, the record.
 */
#ifndef TESTS_FUZZ_RECORD_INPUT_H
#define TESTS_FUZZ_RECORD_INPUT_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "server.h"

#define RECORD_HEAD_BYTES 4u
#define RECORD_NAME_BYTES 512u
#define RECORD_MAX_DROPS  300u /* then the store fails, so that no body takes for ever */

enum record_kind {
    RECORD_VALUE,
    RECORD_HEAD,
    RECORD_BODY,
    RECORD_PIECE,
    RECORD_SCHEMA,
    RECORD_DAY
};

/* One record to read, and what was written last. */
typedef struct record_store {
    char name[RECORD_NAME_BYTES + 1], put_name[RECORD_NAME_BYTES + 1];
    const uint8_t *data; /* borrowed; NULL: it is gone */
    uint8_t *put_data;   /* malloc'd */
    size_t len_bytes, put_bytes;
    uint32_t n_drops;
} record_store;

static inline kvc_status record_put(kvs_tier *tier, const char *name, const void *data,
                                    size_t len_bytes)
{
    record_store *r = (record_store *)(void *)tier;
    if (len_bytes == 0) {
        if (strcmp(name, r->name) == 0)
            r->data = NULL;
        return r->n_drops++ < RECORD_MAX_DROPS ? KVC_OK : KVC_IO;
    }
    free(r->put_data);
    r->put_data = malloc(len_bytes);
    if (r->put_data == NULL)
        return KVC_NO_MEMORY;
    memcpy(r->put_data, data, len_bytes);
    r->put_bytes = len_bytes;
    snprintf(r->put_name, sizeof(r->put_name), "%s", name);
    return KVC_OK;
}

/* Whatever its name. */
static inline kvc_status record_get(kvs_tier *tier, const char *name, void **data_p,
                                    size_t *len_bytes_p)
{
    const record_store *r = (const record_store *)(const void *)tier;
    (void)name;
    *len_bytes_p = 0;
    *data_p = r->data != NULL ? malloc(r->len_bytes + 1) : NULL;
    if (*data_p == NULL)
        return KVC_NOT_FOUND;
    memcpy(*data_p, r->data, r->len_bytes);
    *len_bytes_p = r->len_bytes;
    return KVC_OK;
}

static inline kvc_status record_each(kvs_tier *tier, const char *prefix,
                                     bool (*each)(void *arg, const char *name, const void *data,
                                                  size_t len_bytes),
                                     void *arg)
{
    const record_store *r = (const record_store *)(const void *)tier;
    if (r->data != NULL && strncmp(r->name, prefix, strlen(prefix)) == 0)
        (void)each(arg, r->name, r->data, r->len_bytes);
    return KVC_OK;
}

static const kvs_tier_ops record_ops = {
    .name = "one record", .meta_put = record_put, .meta_get = record_get, .meta_each = record_each};

static inline void record_open(record_store *r, kvs_store *store)
{
    store->ops = &record_ops;
    store->tier = (kvs_tier *)(void *)r;
}

#endif
