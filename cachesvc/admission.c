/*
 * admission.c: the policy and the day's budget; see admission.h.
 *
 * Any thread; one leaf lock. Invariant: writes that may be left out never bring a day's bytes past
 * the budget; those that may not can, and then nothing else is written until the next day.
 */
#include "admission.h"

#include "base/metrics.h"

#define AHEAD    64u /* a record covers this share of the budget beyond what was spent */
#define MAX_ENDS 16u /* and half of it for each process that came to no end, down to this power */

/* What a record covers ahead is lost when its process dies. So it halves with each that did: all of
   them together cost no more than a 32nd of the budget, and then a 4,194,304th each. */
static uint64_t ahead_bytes(const kvs_admission *admission)
{
    uint32_t n = admission->n_ends < MAX_ENDS ? admission->n_ends : MAX_ENDS;
    return admission->budget_bytes / AHEAD >> n;
}

void kvs_admission_init(kvs_admission *admission, kvs_admission_policy policy,
                        uint64_t budget_bytes, uint64_t now_ns)
{
    admission->policy = policy;
    admission->budget_bytes = budget_bytes;
    admission->day_start_ns = now_ns;
    admission->spent_bytes = 0;
    admission->kept_bytes = 0;
    admission->n_ends = 0;
    admission->unkept = false;
    kvc_mutex_init(&admission->lock, KVC_RANK_LEAF);
}

void kvs_admission_fini(kvs_admission *admission)
{
    kvc_mutex_fini(&admission->lock);
}

/* Who looked at the clock before somebody else began the day comes too early, not too late. */
static bool is_over(const kvs_admission *admission, uint64_t now_ns)
{
    return (int64_t)(now_ns - admission->day_start_ns) >= (int64_t)KVS_ADMISSION_DAY_NS;
}

static void turn_day(kvs_admission *admission, uint64_t now_ns)
{
    if (!is_over(admission, now_ns))
        return;
    admission->day_start_ns = now_ns;
    admission->spent_bytes = 0;
    admission->kept_bytes = 0;
    admission->n_ends = 0;
}

void kvs_admission_take_up(kvs_admission *admission, const kvs_admission_day *day, uint64_t now_ns,
                           uint64_t wall_ns)
{
    uint64_t age_ns = wall_ns > day->start_wall_ns ? wall_ns - day->start_wall_ns : 0;
    if (age_ns >= KVS_ADMISSION_DAY_NS)
        return;
    kvc_mutex_lock(&admission->lock);
    admission->day_start_ns = now_ns - age_ns; /* may wrap, where the machine is younger: so it is
                                                  only ever subtracted */
    admission->spent_bytes = admission->kept_bytes = day->spent_bytes;
    admission->n_ends = day->n_ends + !day->exact;
    kvc_mutex_unlock(&admission->lock);
}

bool kvs_admission_due(kvs_admission *admission, uint64_t now_ns, uint64_t wall_ns, bool over,
                       kvs_admission_day *day_p)
{
    kvc_mutex_lock(&admission->lock);
    /* A record of the whole budget says of any more what it says already. */
    bool due = over ? admission->spent_bytes != admission->kept_bytes
                    : admission->spent_bytes > admission->kept_bytes &&
                          admission->kept_bytes < admission->budget_bytes;
    due = due && !is_over(admission, now_ns);
    day_p->start_ns = admission->day_start_ns;
    day_p->start_wall_ns = wall_ns - (now_ns - admission->day_start_ns);
    day_p->spent_bytes = admission->spent_bytes + (over ? 0 : ahead_bytes(admission));
    day_p->n_ends = admission->n_ends;
    day_p->exact = over;
    kvc_mutex_unlock(&admission->lock);
    return due;
}

void kvs_admission_kept(kvs_admission *admission, const kvs_admission_day *day)
{
    kvc_mutex_lock(&admission->lock);
    if (admission->day_start_ns == day->start_ns) /* not that of a day that ended meanwhile */
        admission->kept_bytes = day->spent_bytes;
    kvc_mutex_unlock(&admission->lock);
}

void kvs_admission_spend(kvs_admission *admission, uint64_t len_bytes, uint64_t now_ns)
{
    kvc_mutex_lock(&admission->lock);
    turn_day(admission, now_ns);
    admission->spent_bytes += len_bytes;
    kvc_mutex_unlock(&admission->lock);
}

bool kvs_admission_take(kvs_admission *admission, uint64_t len_bytes, uint64_t now_ns)
{
    kvc_mutex_lock(&admission->lock);
    turn_day(admission, now_ns);
    bool fits = admission->budget_bytes == 0 ||
                (admission->spent_bytes <= admission->budget_bytes &&
                 len_bytes <= admission->budget_bytes - admission->spent_bytes);
    if (fits)
        admission->spent_bytes += len_bytes;
    kvc_mutex_unlock(&admission->lock);
    if (!fits)
        KVC_COUNT(lmdb_budget_refused_values);
    return fits;
}

bool kvs_admission_on_use(kvs_admission *admission, uint64_t now_ns)
{
    if (admission->policy != KVS_ADMIT_SECOND_USE)
        return false;
    kvc_mutex_lock(&admission->lock);
    bool left = admission->budget_bytes == 0 || is_over(admission, now_ns) ||
                admission->spent_bytes < admission->budget_bytes;
    kvc_mutex_unlock(&admission->lock);
    return left;
}
