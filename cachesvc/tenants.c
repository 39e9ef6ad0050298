/*
 * tenants.c: the setting shm_tenants; see tenants.h.
 *
 * Any thread. Invariant: entries and their names are only written before anybody else has the
 * table.
 */
#include "tenants.h"

#include <stdlib.h>
#include <string.h>

#include "kvc/types.h"

typedef struct entry {
    uint32_t id;
    bool is_group;
    const char *name; /* in text */
} entry;

struct kvs_tenants {
    char *text;
    uint32_t n;
    entry entries[]; /* [n] */
};

/* A copy of the list. NULL: no memory. */
static char *copy_of(const char *list)
{
    size_t len_bytes = strlen(list) + 1;
    char *text = malloc(len_bytes);
    if (text)
        memcpy(text, list, len_bytes);
    return text;
}

/* One "UID:NAME" or "@GID:NAME", cut out of its list. False: it is neither. */
static bool parse(char *word, entry *e)
{
    word += strspn(word, " ");
    *e = (entry){.is_group = *word == '@'};
    word += e->is_group;
    size_t digits = strspn(word, "0123456789");
    unsigned long long id = digits > 0 && digits <= 10 ? strtoull(word, NULL, 10) : UINT64_MAX;
    char *name = word + digits;
    if (id > UINT32_MAX || *name != ':')
        return false;
    name += 1 + strspn(name + 1, " ");
    size_t len_bytes = strlen(name);
    while (len_bytes > 0 && name[len_bytes - 1] == ' ')
        name[--len_bytes] = '\0';
    for (size_t i = 0; i < len_bytes; i++)
        if ((unsigned char)name[i] < ' ' || name[i] == 0x7f)
            return false;
    e->id = (uint32_t)id;
    e->name = name;
    return len_bytes >= 1 && len_bytes <= KVC_MAX_NAME_BYTES;
}

static const entry *find(const kvs_tenants *t, uint32_t id, bool is_group)
{
    for (uint32_t i = 0; i < t->n; i++)
        if (t->entries[i].id == id && t->entries[i].is_group == is_group)
            return &t->entries[i];
    return NULL;
}

kvs_tenants *kvs_tenants_create(const char *list)
{
    uint32_t room = 1;
    for (const char *c = list; *c; c++)
        room += *c == ',';
    kvs_tenants *t = calloc(1, sizeof(*t) + room * sizeof(entry));
    if (!t)
        return NULL;
    t->text = copy_of(list);
    bool right = t->text != NULL;
    char *save = NULL, *word = right ? strtok_r(t->text, ",", &save) : NULL;
    for (; right && word; word = strtok_r(NULL, ",", &save)) {
        if (word[strspn(word, " ")] == '\0') /* an empty list, say */
            continue;
        entry *e = &t->entries[t->n];
        right = parse(word, e) && !find(t, e->id, e->is_group);
        t->n++;
    }
    if (right)
        return t;
    kvs_tenants_destroy(t);
    return NULL;
}

void kvs_tenants_destroy(kvs_tenants *t)
{
    if (!t)
        return;
    free(t->text);
    free(t);
}

bool kvs_tenants_check(const char *list)
{
    kvs_tenants *t = kvs_tenants_create(list);
    bool right = t != NULL;
    kvs_tenants_destroy(t);
    return right;
}

const char *kvs_tenants_find(const kvs_tenants *t, uint32_t uid, uint32_t gid)
{
    const entry *e = find(t, uid, false);
    if (!e)
        e = find(t, gid, true);
    return e ? e->name : "default";
}
