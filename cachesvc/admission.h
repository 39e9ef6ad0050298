/*
 * admission.h: which values of MEMORY puts are worth a write to lmdb.
 *
 * lmdb takes less than a fast prefill makes, and flash wears. The policy says which values want a
 * write; the budget says how many bytes a day all writes together may be. A DURABLE put is a
 * promise and is always written, and so is what has no room in dram; they count against the budget,
 * which MEMORY values then find spent.
 */
#ifndef KVS_ADMISSION_H
#define KVS_ADMISSION_H

#include <stdbool.h>
#include <stdint.h>

#include "base/thread.h"

typedef enum kvs_admission_policy {
    KVS_ADMIT_ALL = 0,      /* MEMORY puts reach lmdb too, later */
    KVS_ADMIT_SECOND_USE,   /* once they were read after their put */
    KVS_ADMIT_DURABLE_ONLY, /* a MEMORY value that dram evicts is lost */
} kvs_admission_policy;

#define KVS_ADMISSION_DAY_NS (86400ull * 1000000000ull)

typedef struct kvs_admission {
    kvs_admission_policy policy;
    uint64_t budget_bytes; /* a day; 0: no limit */
    kvc_mutex lock;        /* rank LEAF; guards the four below */
    uint64_t day_start_ns, spent_bytes;
    uint64_t kept_bytes; /* that the day's record covers */
    uint32_t n_ends;     /* of processes that left no exact record behind, this day */
    bool unkept;         /* the last record could not be written; its writer's */
} kvs_admission;

/* A day, as a later process takes it up. */
typedef struct kvs_admission_day {
    uint64_t start_wall_ns; /* CLOCK_REALTIME */
    uint64_t spent_bytes;
    uint32_t n_ends;   /* processes that ended before with a record that was not exact */
    bool exact;        /* nothing was covered ahead: its process came to its end */
    uint64_t start_ns; /* CLOCK_MONOTONIC: of this process, and not recorded */
} kvs_admission_day;

void kvs_admission_init(kvs_admission *admission, kvs_admission_policy policy,
                        uint64_t budget_bytes, uint64_t now_ns);
void kvs_admission_fini(kvs_admission *admission);

/* A day begins with the first write after the last one ended; now_ns is CLOCK_MONOTONIC. */

/* Goes on with a day, if it has not ended. One that begins later than now, since the clock was set
   back, begins now. Before any write. */
void kvs_admission_take_up(kvs_admission *admission, const kvs_admission_day *day, uint64_t now_ns,
                           uint64_t wall_ns);
/* Whether a record is to be written: the last covers neither what was spent nor the whole budget,
   or (over) is not exact. *day_p: what it is to say. Any thread. */
bool kvs_admission_due(kvs_admission *admission, uint64_t now_ns, uint64_t wall_ns, bool over,
                       kvs_admission_day *day_p);
/* It was written. */
void kvs_admission_kept(kvs_admission *admission, const kvs_admission_day *day);

/* A write that is made in any case. Any thread. */
void kvs_admission_spend(kvs_admission *admission, uint64_t len_bytes, uint64_t now_ns);
/* A write that may be left out: false, counted, once the day's bytes would be passed. Any thread.
 */
bool kvs_admission_take(kvs_admission *admission, uint64_t len_bytes, uint64_t now_ns);
/* Whether a use of a value that is only in dram makes it want a write now. Any thread. */
bool kvs_admission_on_use(kvs_admission *admission, uint64_t now_ns);

#endif
