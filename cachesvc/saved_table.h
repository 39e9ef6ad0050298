/*
 * saved_table.h: what saved.c and saved_put.c share.
 *
 * The list is sorted by tenant and name; it is walked, since a server has few saved contexts and
 * looks one up once a message of up to a MiB.
 */
#ifndef KVS_SAVED_TABLE_H
#define KVS_SAVED_TABLE_H

#include "saved.h"
#include "saved_record.h"

typedef struct kvsi_saved_entry {
    struct kvsi_saved_entry *next;
    kvc_digest tenant;
    kvc_saved_context context;
    const kvs_schema *schema; /* held; NULL: it was lost */
    kvs_body *body;           /* NULL before its first piece */
    /* while it is an upload */
    uint64_t received, if_generation, expires_ns;
    bool replace, busy;
    uint32_t tail_parts[];
} kvsi_saved_entry;

struct kvs_saved {
    kvs_server *server;
    kvc_mutex lock;         /* rank LEAF; guards all below */
    kvsi_saved_entry *list; /* by tenant and name */
    kvsi_saved_entry *uploads;
    uint64_t last_generation;
};

/* A copy of a head, without a body and in no list; NULL: no memory. */
kvsi_saved_entry *kvsi_saved_entry_new(const kvc_digest *tenant, const kvc_saved_context *from);
/* Of an entry that is in no list: gives up body and schema. May block. NULL is fine. */
void kvsi_saved_entry_drop(kvs_saved *saved, kvsi_saved_entry *e);
/* Where the name is, or belongs: *link of the first entry that is not before it. Locked. */
kvsi_saved_entry **kvsi_saved_place(kvs_saved *saved, const kvc_digest *tenant, const char *name);
bool kvsi_saved_is_at(kvsi_saved_entry *const *link, const kvc_digest *tenant, const char *name);
/* NULL: the name is free. Locked. */
kvsi_saved_entry *kvsi_saved_find(kvs_saved *saved, const kvc_digest *tenant, const char *name);

#endif
