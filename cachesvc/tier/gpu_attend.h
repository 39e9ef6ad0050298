/*
 * gpu_attend.h: attention of a GPU over rows where they lie, for AttendRows: in the gpu tier's
 * memory, and in segments of dram that the GPU reads over PCIe.
 *
 * One table, in builds with CUDA. Whoever attends takes a lane (a stream with memory of its own),
 * enqueues groups, finishes, reads the partials and gives the lane back; a lane is one thread's at
 * a time, everything else is for any thread. Segments of dram are readable once they were pinned,
 * until they go (base/lent.h tells). All memory but what pinning takes is there from open on.
 */
#ifndef KVS_GPU_ATTEND_H
#define KVS_GPU_ATTEND_H

#include <stdbool.h>

#include "kvk/compute.h"

typedef struct kvs_gpu_attender kvs_gpu_attender;
typedef struct kvs_gpu_lane kvs_gpu_lane;

/* One group: as for kvk_attend (visible, o and lse are not looked at), but rows [n_kv] are
 * addresses that the device reads. */
typedef struct kvs_gpu_group {
    kvk_attend_args attend;
    uint32_t row_bytes;
} kvs_gpu_group;

/* o [n_q, n_q_heads, head_dim], lse [n_q, n_q_heads]: of a lane, there once it has finished and
   until it is given back. */
typedef struct kvs_gpu_partial {
    const float *o, *lse;
    uint32_t n, dim; /* n_q * n_q_heads */
    size_t off_bytes;
} kvs_gpu_partial;

/* What a group takes of a lane: for what goes to the device, and for what comes. */
typedef struct kvs_gpu_room {
    size_t in_bytes, out_bytes;
} kvs_gpu_room;

typedef struct kvs_gpu_attend_ops {
    /* Of dram, whose segments have segment_bytes, pin_bytes at most are pinned. UNSUPPORTED: there
       is no such device; NO_MEMORY; DEVICE. May block. */
    kvc_status (*open)(uint32_t device, uint64_t pin_bytes, uint64_t segment_bytes,
                       kvs_gpu_attender **attender_p);
    /* Every lane has been given back, and nobody pins. NULL is fine. */
    void (*close)(kvs_gpu_attender *attender);
    /* False: the device does not take such a group. Looks at its shape, inv_freq and k_positions
       being NULL or not, and n_kv. */
    bool (*room)(const kvs_gpu_attender *attender, const kvs_gpu_group *group,
                 kvs_gpu_room *room_p);
    kvs_gpu_room lane_room; /* what a lane has for all groups of a call */

    /* Whether segment `number` of dram, which is at base, is to be pinned now, by the caller. */
    bool (*claim)(kvs_gpu_attender *attender, uint32_t number, const void *base, size_t len_bytes);
    /* After claim, while a slot of the segment is held: pins it (pin), or takes the claim back.
       Milliseconds. NO_MEMORY: for now nothing more is claimed; DEVICE; others: it stays as it is
       until it goes. */
    kvc_status (*settle)(kvs_gpu_attender *attender, uint32_t number, bool pin);
    /* Where the device reads a row of that segment, of which a slot is held; NULL: nowhere.
     *may_claim_p: it is worth a claim. */
    const void *(*find)(kvs_gpu_attender *attender, uint32_t number, const void *row,
                        bool *may_claim_p);

    /* NULL: all lanes are taken, and the caller does not wait, or has waited until then (0: for
       ever). */
    kvs_gpu_lane *(*take)(kvs_gpu_attender *attender, bool wait, uint64_t until_ns);
    /* Enqueues; copies what it needs. UNSUPPORTED: the device does not take it after all; AGAIN:
       the lane's room is used up; DEVICE. */
    kvc_status (*attend)(kvs_gpu_lane *lane, const kvs_gpu_group *group,
                         kvs_gpu_partial *partial_p);
    /* A partial of the same queries over other rows, from the host's memory, into that one. */
    kvc_status (*add)(kvs_gpu_lane *lane, const kvs_gpu_partial *partial, const float *o,
                      const float *lse);
    /* Waits for all of it. */
    kvc_status (*finish)(kvs_gpu_lane *lane);
    /* Waits for what was enqueued; nothing of the lane's reads a row any more. */
    void (*give)(kvs_gpu_lane *lane);
} kvs_gpu_attend_ops;

/* NULL: a build without CUDA. */
const kvs_gpu_attend_ops *kvs_gpu_attend_find(void);

#endif
