/*
 * fault.c: the table of armed fault points.
 *
 * Any thread. The table is guarded by a plain mutex without a rank: nothing is called while it is
 * held, so it may be taken under any other lock. It is only taken while something is armed.
 */
#include "base/fault.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/metrics.h"
#include "base/text.h"

enum mode { MODE_ALWAYS, MODE_ONCE, MODE_EVERY, MODE_AFTER, MODE_NTH };

struct point {
    char name[KVC_FAULT_NAME_BYTES];
    enum mode mode;
    uint64_t n, passes, failures;
};

struct table {
    struct point points[KVC_FAULT_POINTS_MAX];
    unsigned n_points;
};

atomic_bool kvc_fault_armed;

static pthread_mutex_t g_lock = PTHREAD_MUTEX_INITIALIZER; /* guards g_table */
static struct table g_table;

static struct point *find_point(const char *name)
{
    for (unsigned i = 0; i < g_table.n_points; i++) {
        if (strcmp(g_table.points[i].name, name) == 0)
            return &g_table.points[i];
    }
    return NULL;
}

static bool fails(const struct point *point)
{
    switch (point->mode) {
    case MODE_ALWAYS:
        return true;
    case MODE_ONCE:
        return point->passes == 1;
    case MODE_EVERY:
        return point->passes % point->n == 0;
    case MODE_AFTER:
        return point->passes > point->n;
    case MODE_NTH:
        return point->passes == point->n;
    }
    return false;
}

bool kvc_fault_hit(const char *name)
{
    bool fail = false;
    (void)pthread_mutex_lock(&g_lock);
    struct point *point = find_point(name);
    if (point != NULL) {
        point->passes++;
        fail = fails(point);
        point->failures += fail ? 1 : 0;
    }
    (void)pthread_mutex_unlock(&g_lock);
    if (fail) {
        KVC_COUNT(faults_injected);
        KVC_LOG_DEBUG(FAULT, "fault point %s fails on purpose", name);
    }
    return fail;
}

/* "always", "once", "every:3" ... */
static bool parse_mode(const char *text, struct point *point)
{
    static const struct {
        const char *prefix;
        enum mode mode;
    } counted[] = {{"every:", MODE_EVERY}, {"after:", MODE_AFTER}, {"nth:", MODE_NTH}};
    if (strcmp(text, "always") == 0 || strcmp(text, "once") == 0) {
        point->mode = text[0] == 'a' ? MODE_ALWAYS : MODE_ONCE;
        return true;
    }
    for (size_t i = 0; i < sizeof(counted) / sizeof(counted[0]); i++) {
        size_t len_bytes = strlen(counted[i].prefix);
        if (strncmp(text, counted[i].prefix, len_bytes) != 0)
            continue;
        point->mode = counted[i].mode;
        return kvc_uint_parse(text + len_bytes, &point->n) == KVC_OK &&
               (point->n > 0 || point->mode == MODE_AFTER);
    }
    return false;
}

/* One "name=mode" of len_bytes. */
static bool parse_point(const char *text, size_t len_bytes, struct point *point)
{
    char item[KVC_FAULT_NAME_BYTES + 32];
    if (len_bytes >= sizeof(item))
        return false;
    memcpy(item, text, len_bytes);
    item[len_bytes] = '\0';
    char *equals = strchr(item, '=');
    if (equals == NULL || equals == item || equals - item >= KVC_FAULT_NAME_BYTES)
        return false;
    *equals = '\0';
    *point = (struct point){.n = 0};
    memcpy(point->name, item, (size_t)(equals - item));
    return parse_mode(equals + 1, point);
}

static bool parse_spec(const char *spec, struct table *table)
{
    table->n_points = 0;
    while (*spec != '\0') {
        size_t len_bytes = strcspn(spec, ",");
        if (table->n_points == KVC_FAULT_POINTS_MAX ||
            !parse_point(spec, len_bytes, &table->points[table->n_points]))
            return false;
        table->n_points++;
        spec += len_bytes;
        if (*spec == ',' && *++spec == '\0')
            return false;
    }
    return true;
}

kvc_status kvc_fault_arm(const char *spec)
{
    struct table table;
    if (!parse_spec(spec == NULL ? "" : spec, &table)) {
        KVC_LOG_ERROR(FAULT, "bad fault spec '%s': wanted name=always|once|every:N|after:N|nth:N",
                      spec);
        return KVC_INVALID;
    }
    (void)pthread_mutex_lock(&g_lock);
    memcpy(&g_table.points, table.points, table.n_points * sizeof(table.points[0]));
    g_table.n_points = table.n_points;
    atomic_store_explicit(&kvc_fault_armed, table.n_points > 0, memory_order_relaxed);
    (void)pthread_mutex_unlock(&g_lock);
    for (unsigned i = 0; i < table.n_points; i++)
        KVC_LOG_WARN(FAULT, "fault point %s is armed", table.points[i].name);
    return KVC_OK;
}

kvc_status kvc_fault_arm_env(void)
{
    const char *spec = getenv("KVASIR_FAULT");
    return spec == NULL ? KVC_OK : kvc_fault_arm(spec);
}

uint64_t kvc_fault_passes(const char *name)
{
    (void)pthread_mutex_lock(&g_lock);
    const struct point *point = find_point(name);
    uint64_t passes = point == NULL ? 0 : point->passes;
    (void)pthread_mutex_unlock(&g_lock);
    return passes;
}

uint64_t kvc_fault_failures(const char *name)
{
    (void)pthread_mutex_lock(&g_lock);
    const struct point *point = find_point(name);
    uint64_t failures = point == NULL ? 0 : point->failures;
    (void)pthread_mutex_unlock(&g_lock);
    return failures;
}
