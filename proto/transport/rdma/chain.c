/*
 * chain.c: chains of WRITEs: the slices of an answer, or the copy of them, to places at the client.
 *
 * With the loop's mutex held, on any thread. A WRITE goes to one place and gathers as many pieces
 * as the queue pair takes; none is signalled: the frame behind them is. Counting and posting walk
 * the same way, so that a chain is begun only where the queue has room for all of it.
 */
#include "base/metrics.h"
#include "rdma_internal.h"

/* Where the next WRITE begins. */
typedef struct walk {
    const kvt_slice *slices;
    uint32_t n_slices, slice;
    size_t slice_off_bytes;
    const kvtr_place *places;
    uint32_t n_places, place;
    uint64_t place_off_bytes;
} walk;

/* The next WRITE: its pieces, without their keys, and where it goes. False: there is none. */
static bool next_write(walk *w, uint32_t max_sge, struct ibv_sge *sge, uint32_t *n_sge_p,
                       uint64_t *addr_p)
{
    if (w->place == w->n_places)
        return false;
    const kvtr_place *place = &w->places[w->place];
    *addr_p = place->addr + w->place_off_bytes;
    *n_sge_p = 0;
    while (w->slice < w->n_slices && *n_sge_p < max_sge && w->place_off_bytes < place->len_bytes) {
        const kvt_slice *slice = &w->slices[w->slice];
        size_t n_bytes = slice->len_bytes - w->slice_off_bytes;
        uint64_t room_bytes = place->len_bytes - w->place_off_bytes;
        if (n_bytes > room_bytes)
            n_bytes = (size_t)room_bytes;
        if (n_bytes > 0)
            sge[(*n_sge_p)++] =
                (struct ibv_sge){(uintptr_t)slice->base + w->slice_off_bytes, (uint32_t)n_bytes, 0};
        w->slice_off_bytes += n_bytes;
        w->place_off_bytes += n_bytes;
        if (w->slice_off_bytes == slice->len_bytes) {
            w->slice++;
            w->slice_off_bytes = 0;
        }
    }
    if (w->place_off_bytes == place->len_bytes) {
        w->place++;
        w->place_off_bytes = 0;
    }
    return *n_sge_p > 0;
}

static uint32_t count(walk w, uint32_t max_sge)
{
    struct ibv_sge sge[KVTI_MAX_SGE];
    uint32_t n = 0, n_sge;
    uint64_t addr;
    while (next_write(&w, max_sge, sge, &n_sge, &addr))
        n++;
    return n;
}

uint32_t kvtr_chain_wrs(kvtr_link *link, const kvt_slice *slices, uint32_t n_slices,
                        const kvtr_place *places, uint32_t n_places)
{
    for (uint32_t i = 0; i < n_slices; i++) {
        if (slices[i].len_bytes > 0 &&
            kvtr_range_find(link->domain, slices[i].base, slices[i].len_bytes) == NULL)
            return 0;
    }
    walk w = {.slices = slices, .n_slices = n_slices, .places = places, .n_places = n_places};
    return count(w, link->max_sge);
}

/* The keys of the pieces. */
static bool set_keys(kvtr_link *link, const kvtr_out *out, struct ibv_sge *sge, uint32_t n_sge)
{
    for (uint32_t i = 0; i < n_sge; i++) {
        const void *at = (const void *)(uintptr_t)sge[i].addr;
        struct ibv_mr *mr =
            out->buf != NULL ? out->buf->mr : kvtr_range_find(link->domain, at, sge[i].length);
        if (mr == NULL) {
            kvtr_link_break(link, "memory of an answer was taken back");
            return false;
        }
        sge[i].lkey = mr->lkey;
    }
    return true;
}

static bool post_write(kvtr_link *link, const kvtr_out *out, struct ibv_sge *sge, uint32_t n_sge,
                       uint64_t addr)
{
    struct ibv_send_wr wr = {
        .sg_list = sge,
        .num_sge = (int)n_sge,
        .opcode = IBV_WR_RDMA_WRITE,
        .wr.rdma = {.remote_addr = addr, .rkey = out->remote_key},
    };
    if (!set_keys(link, out, sge, n_sge) || !kvtr_post(link, &wr))
        return false;
    link->sq_used++;
    link->sq_unsignalled++;
    KVC_COUNT(rdma_work_requests);
    return true;
}

bool kvtr_post_chain(kvtr_link *link, kvtr_out *out)
{
    struct ibv_sge sge[KVTI_MAX_SGE];
    uint32_t n_sge;
    uint64_t addr;
    bool ok = true;
    if (!out->chain)
        return true;
    kvt_slice copy = {.len_bytes = out->data_bytes};
    walk w = {.slices = out->slices,
              .n_slices = out->n_slices,
              .places = out->places,
              .n_places = out->n_places};
    if (out->buf != NULL) {
        copy.base = out->buf->bytes;
        w.slices = &copy;
        w.n_slices = 1;
    }
    if (link->sq_used + count(w, link->max_sge) + 1 > link->sq_depth)
        return false;
    while (ok && next_write(&w, link->max_sge, sge, &n_sge, &addr))
        ok = post_write(link, out, sge, n_sge, addr);
    out->chain = false;
    if (ok)
        KVC_COUNT_N(rdma_written_bytes, out->data_bytes);
    return ok;
}
