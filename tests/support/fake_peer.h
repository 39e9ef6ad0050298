/*
 * fake_peer.h: the connecting end of an RDMA link, by hand, over fake_verbs.h: it says whatever a
 * test wants it to say.
 *
 * One thread, the test's. It asserts by cmocka that the fake lets it do so, and gives up after 20 s
 * where it waits.
 */
#ifndef TESTS_SUPPORT_FAKE_PEER_H
#define TESTS_SUPPORT_FAKE_PEER_H

#include "fake_verbs.h"
#include "wire/frame.h"

#define PEER_FRAG_BYTES 4096u
#define PEER_ENV_BYTES  8u
#define PEER_RECVS      32u
#define PEER_NO_MORE    UINT32_MAX
#define PEER_PLACED     0x0200u /* flag of a request whose data are runs: */
#define PEER_RUN_BYTES  16u     /* u64 address, u32 rows, u32 bytes of a row */

/* What it says in the handshake; the fields of the private data, and READs that it serves. */
typedef struct fake_intro {
    uint32_t magic, version, credits, frag_bytes, max_message_bytes, max_reads;
    uint8_t depth;
} fake_intro;

typedef struct fake_peer {
    struct rdma_event_channel *channel;
    struct rdma_cm_id *id;
    struct ibv_pd *pd;
    struct ibv_comp_channel *comp;
    struct ibv_cq *cq;
    struct ibv_mr *mr;
    uint8_t *ring;    /* [PEER_RECVS + 1][PEER_FRAG_BYTES] the last to send from */
    uint32_t granted; /* fragments that the server will take */
    uint32_t owed;    /* it may be given; peer_send gives them unless stingy */
    bool stingy;
    bool up, down;             /* the connection stands; has ended */
    uint32_t n_frames, n_ends; /* whole answers in one fragment that came, and ENDs among them */
    kvc_frame last;            /* the last of them */
} fake_peer;

extern const fake_intro fake_good_intro;

/* Connects to a server of this process at uri, with intro (NULL: a good one). False: refused. */
bool peer_connect(fake_peer *p, const char *uri, const fake_intro *intro);
/* Takes it all down. */
void peer_close(fake_peer *p);
/* Takes what has come: fragments, and the end of the connection. */
void peer_poll(fake_peer *p);
/* Waits until the server has ended the connection; false: it has not, within 20 s. */
bool peer_cut_off(fake_peer *p);
/* Waits until it may send n fragments; false: the connection has ended, or 20 s have passed. */
bool peer_wait_granted(fake_peer *p, uint32_t n);
/* One fragment of [len_bytes], against the server's grants or not. False: the connection is over.
 */
bool peer_fragment(fake_peer *p, const void *bytes, uint32_t len_bytes, uint32_t given);
/* A frame with its body in fragments, of which only the first n_bytes of the body are sent, as fast
 * as the server grants. False: the connection is over. */
bool peer_send(fake_peer *p, const kvc_frame *frame, const void *body, size_t n_bytes);

#endif
