/*
 * map_serve.c: rows of mapped values to the caller's slots, without a request.
 *
 * Caller's threads, before anything is sent. Rows are copied first and the lease is looked at
 * afterwards: where a map was taken back meanwhile, all of its picks are fetched, and what was
 * copied is written over.
 */
#include <stdlib.h>
#include <string.h>

#include "base/metrics.h"
#include "map.h"

/* One group's picks against its map; index [n_picks] gets those that are left. */
static uint32_t serve_rows(const kvci_map *map, uint32_t part, const kvc_pick_group *group,
                           uint8_t *dst, uint32_t *left)
{
    uint32_t n_left = 0, n_parts = map->n_parts, tokens = map->block_tokens;
    uint32_t n_blocks = atomic_load(&map->n_blocks);
    size_t row_bytes = group->row_bytes;
    for (uint32_t i = 0; i < group->n_picks; i++) {
        uint32_t block = group->picks[i] / tokens;
        const uint8_t *value =
            block < n_blocks ? map->values[(size_t)block * n_parts + part] : NULL;
        if (value == NULL) {
            left[n_left++] = i;
            continue;
        }
        uint32_t slot = group->dst_slots != NULL ? group->dst_slots[i] : i;
        memcpy(dst + slot * row_bytes, value + (group->picks[i] - block * tokens) * row_bytes,
               row_bytes);
    }
    return n_left;
}

/* Writes the picks of a group that are left to left [n_picks]; gives how many. */
static uint32_t serve_group(const kvc_pick_group *group, const kvc_region *dst, uint32_t *left,
                            bool *mapped_p)
{
    kvci_map *map = kvci_map_of(group->context);
    int part = map == NULL ? -1 : kvci_map_part(map, group->part);
    uint32_t n_left = group->n_picks;
    bool good = false;
    /* Looked at before as well: rows that are gone leave their slots as they were. */
    if (part >= 0 && map->row_bytes[part] == group->row_bytes && kvci_map_holds(map)) {
        *mapped_p = true;
        n_left = serve_rows(map, (uint32_t)part, group, dst->base + group->dst_off_bytes, left);
        good = kvci_map_holds(map);
    }
    kvci_map_unref(map);
    if (good)
        return n_left;
    for (uint32_t i = 0; i < group->n_picks; i++)
        left[i] = i;
    return group->n_picks;
}

/* Memory for the picks of n_groups, n in all, most of one group; kept from fetch to fetch. */
static kvci_left *take_left(kvc_client *client, uint32_t n_groups, uint32_t n)
{
    size_t head = (sizeof(kvci_left) + 15) / 16 * 16;
    size_t room_bytes =
        head + n_groups * sizeof(kvc_pick_group) + n * (4 * sizeof(uint32_t) + sizeof(int8_t)) + 8;
    kvc_mutex_lock(&client->lock);
    kvci_left *left = client->left;
    client->left = NULL;
    kvc_mutex_unlock(&client->lock);
    if (left == NULL || left->room_bytes < room_bytes) {
        free(left);
        left = malloc(room_bytes);
        if (left == NULL)
            return NULL;
        left->room_bytes = room_bytes;
    }
    left->n_groups = n_groups;
    left->n = 0;
    left->final = NULL;
    left->groups = (kvc_pick_group *)((uint8_t *)left + head);
    left->index = (uint32_t *)(left->groups + n_groups);
    left->status = (int8_t *)(left->index + 4 * (size_t)n);
    return left;
}

void kvci_left_put(kvc_client *client, kvci_left *left)
{
    if (left != NULL && left->room_bytes <= KVCI_POOL_BYTES && client->left == NULL)
        client->left = left;
    else
        free(left);
}

static void give_left(kvc_client *client, kvci_left *left)
{
    kvc_mutex_lock(&client->lock);
    kvci_left_put(client, left);
    kvc_mutex_unlock(&client->lock);
}

/* The same group with only the picks that are left, whose slots are named now. */
static void add_group(kvci_left *left, uint32_t n_all, const kvc_pick_group *group, uint32_t g,
                      uint32_t first, const uint32_t *picks_left, uint32_t n)
{
    uint32_t *picks = left->index + n_all + left->n, *slots = picks + n_all;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t k = picks_left[i];
        picks[i] = group->picks[k];
        slots[i] = group->dst_slots != NULL ? group->dst_slots[k] : k;
        left->index[left->n + i] = first + k;
    }
    left->groups[g] = *group;
    left->groups[g].picks = picks;
    left->groups[g].dst_slots = slots;
    left->groups[g].n_picks = n;
    left->n += n;
}

static bool any_map(const kvc_pick_group *groups, uint32_t n_groups)
{
    for (uint32_t g = 0; g < n_groups; g++)
        if (atomic_load_explicit(&groups[g].context->has_map, memory_order_relaxed))
            return true;
    return false;
}

kvci_left *kvci_serve(kvc_client *client, const kvc_pick_group *groups, uint32_t n_groups,
                      const kvc_region *dst, int8_t *status, kvc_fetch_info *info)
{
    uint32_t n_all = 0, first = 0;
    bool mapped = false;
    if (!any_map(groups, n_groups))
        return NULL;
    for (uint32_t g = 0; g < n_groups; g++)
        n_all += groups[g].n_picks;
    kvci_left *left = take_left(client, n_groups, n_all);
    for (uint32_t g = 0; left != NULL && g < n_groups; g++) {
        uint32_t *picks_left = left->index + 3 * (size_t)n_all; /* [n_all], of a group at a time */
        uint32_t n = serve_group(&groups[g], dst, picks_left, &mapped);
        add_group(left, n_all, &groups[g], g, first, picks_left, n);
        first += groups[g].n_picks;
    }
    if (left == NULL)
        return NULL;
    if (!mapped) {
        give_left(client, left);
        return NULL;
    }
    left->final = status;
    if (status != NULL)
        memset(status, KVC_OK, n_all);
    info->rows_dram += n_all - left->n;
    KVC_COUNT_N(client_mapped_rows, n_all - left->n);
    return left;
}
