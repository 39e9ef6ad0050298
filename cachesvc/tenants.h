/*
 * tenants.h: which tenant a process of this host is, by the user and group that the kernel says it
 * has (setting shm_tenants).
 *
 * A list of UID:TENANT and @GID:TENANT, separated by commas. A user's own entry comes before its
 * group's; who has neither is "default". The group is the process's effective one: supplementary
 * groups do not count. Fixed once made, so any thread may ask.
 */
#ifndef KVS_TENANTS_H
#define KVS_TENANTS_H

#include <stdbool.h>
#include <stdint.h>

typedef struct kvs_tenants kvs_tenants;

/* Whether the list makes sense: numbers within 32 bits, none twice, names of 1 to 255 characters.
 */
bool kvs_tenants_check(const char *list);
/* NULL: no memory, or the list does not make sense. */
kvs_tenants *kvs_tenants_create(const char *list);
void kvs_tenants_destroy(kvs_tenants *tenants); /* NULL is fine */
/* The tenant's name, which lives as long as tenants. */
const char *kvs_tenants_find(const kvs_tenants *tenants, uint32_t uid, uint32_t gid);

#endif
