/*
 * common.c: names, the table of ids that both ends keep, and the transport's table.
 */
#include <string.h>
#include <sys/socket.h>

#include "shm_internal.h"

kvc_status kvti_shm_address(const char *uri, struct sockaddr_un *address_p)
{
    static const char scheme[] = "shm://";
    if (uri == NULL || strncmp(uri, scheme, sizeof(scheme) - 1) != 0)
        return KVC_INVALID;
    const char *path = uri + sizeof(scheme) - 1;
    size_t len = strlen(path);
    if (path[0] != '/' || len < 2 || len >= KVTI_SHM_PATH_BYTES)
        return KVC_INVALID;
    *address_p = (struct sockaddr_un){.sun_family = AF_UNIX};
    memcpy(address_p->sun_path, path, len + 1);
    return KVC_OK;
}

static kvti_node **bucket(kvti_table *table, uint64_t id)
{
    return &table->buckets[(id * UINT64_C(0x9E3779B97F4A7C15)) >> 56];
}

kvti_node *kvti_table_find(const kvti_table *table, uint64_t id)
{
    kvti_node *node = *bucket((kvti_table *)(uintptr_t)table, id);
    while (node != NULL && node->id != id)
        node = node->chain;
    return node;
}

void kvti_table_add(kvti_table *table, kvti_node *node)
{
    kvti_node **head = bucket(table, node->id);
    node->chain = *head;
    *head = node;
    node->prev = NULL;
    node->next = table->all;
    if (node->next != NULL)
        node->next->prev = node;
    table->all = node;
    table->n++;
}

void kvti_table_remove(kvti_table *table, kvti_node *node)
{
    kvti_node **at = bucket(table, node->id);
    while (*at != node)
        at = &(*at)->chain;
    *at = node->chain;
    if (node->prev != NULL)
        node->prev->next = node->next;
    else
        table->all = node->next;
    if (node->next != NULL)
        node->next->prev = node->prev;
    table->n--;
}

static const char *const schemes[] = {"shm", NULL};

const kvt_ops kvt_shm_ops = {
    .name = "shm",
    .schemes = schemes,
    .listen = kvti_shm_listen,
    .listener_uri = kvti_shm_listener_uri,
    .set_serving = kvti_shm_set_serving,
    .drain = kvti_shm_drain,
    .listener_close = kvti_shm_listener_close,
    .reply = kvti_shm_reply,
    .send = kvti_shm_send,
    .recv = kvti_shm_recv,
    .unrecv = kvti_shm_unrecv,
    .drop_data = kvti_shm_drop_data,
    .connect = kvti_shm_connect,
    .submit = kvti_shm_submit,
    .push = kvti_shm_push,
    .cancel = kvti_shm_cancel,
    .conn_close = kvti_shm_conn_close,
};
