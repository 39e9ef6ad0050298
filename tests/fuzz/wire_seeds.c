/*
 * wire_seeds.c: writes one seed per method and direction, and a few broken ones, to a folder.
 *
 * Usage: wire_seeds FOLDER. Files go to FOLDER/request, FOLDER/reply and FOLDER/frame.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "base/arena.h"
#include "samples.h"
#include "wire/frame.h"
#include "wire/wire.h"
#include "wire_input.h"

#define SEED_DATA_BYTES 200

/* One seed file: method, cut, header, payload. */
static int write_seed(const char *path, int method, int cut, const void *head, size_t head_bytes,
                      const struct iovec *data, uint32_t n_data)
{
    FILE *file = fopen(path, "wb");
    if (file == NULL)
        return 1;
    int bad = fputc(method, file) == EOF || fputc(cut, file) == EOF;
    bad |= fwrite(head, 1, head_bytes, file) != head_bytes;
    for (uint32_t i = 0; i < n_data; i++)
        bad |= data[i].iov_len > 0 && fwrite(data[i].iov_base, data[i].iov_len, 1, file) != 1;
    return fclose(file) != 0 || bad;
}

static int write_method(const char *folder, kvc_method method)
{
    char path[4096];
    kvc_arena arena;
    const void *head;
    size_t head_bytes;
    int bad = 0, cut = (int)method * 3; /* some whole, some in small pieces */
    kvc_arena_init(&arena, 16u << 20);
    kvc_request req = sample_request(method, SEED_DATA_BYTES, &arena);
    (void)snprintf(path, sizeof(path), "%s/request/%s", folder, kvc_method_name(method));
    bad |= kvc_wire_encode_request(&req, &arena, &head, &head_bytes) != KVC_OK ||
           write_seed(path, (int)method, cut, head, head_bytes, req.data, req.n_data);
    kvc_reply reply = sample_reply(method, SEED_DATA_BYTES, &arena);
    (void)snprintf(path, sizeof(path), "%s/reply/%s", folder, kvc_method_name(method));
    bad |= kvc_wire_encode_reply(&reply, &arena, &head, &head_bytes) != KVC_OK ||
           write_seed(path, (int)method, cut, head, head_bytes, reply.data, reply.n_data);
    kvc_arena_reset(&arena);
    return bad;
}

/* A hello, a request with its body, and an answer, as they follow each other on a connection. */
static int write_frames(const char *folder)
{
    char path[4096];
    static const uint8_t body[KVC_HELLO_BYTES + 40] = {KVC_FRAME_VERSION};
    const kvc_frame frames[] = {
        {.kind = KVC_FRAME_HELLO, .head_bytes = KVC_HELLO_BYTES},
        {.kind = KVC_FRAME_REQUEST, .method = KVC_FETCH_ROWS, .call = 1, .head_bytes = 40},
        {.kind = KVC_FRAME_MESSAGE, .call = 2, .flags = KVC_FRAME_LAST, .data_bytes = 9},
        {.kind = KVC_FRAME_END, .call = 1, .status = KVC_AGAIN, .detail_bytes = 12},
    };
    (void)snprintf(path, sizeof(path), "%s/frame/connection", folder);
    FILE *file = fopen(path, "wb");
    int bad = file == NULL;
    for (size_t i = 0; !bad && i < sizeof(frames) / sizeof(frames[0]); i++) {
        uint8_t head[KVC_FRAME_BYTES];
        size_t body_bytes = kvc_frame_body_bytes(&frames[i]);
        bad = kvc_frame_encode(&frames[i], head) != KVC_OK ||
              fwrite(head, 1, sizeof(head), file) != sizeof(head) ||
              fwrite(body, 1, body_bytes, file) != body_bytes;
    }
    return (file != NULL && fclose(file) != 0) || bad;
}

static int make_folder(const char *folder, const char *name)
{
    char path[4096];
    (void)snprintf(path, sizeof(path), "%s/%s", folder, name);
    return mkdir(path, 0777) != 0 && errno != EEXIST;
}

int main(int argc, char **argv)
{
    int bad = argc != 2;
    if (bad || make_folder(argv[1], "") || make_folder(argv[1], "request") ||
        make_folder(argv[1], "reply") || make_folder(argv[1], "frame"))
        return 1;
    bad |= write_frames(argv[1]);
    for (int m = 0; m < KVC_METHOD_COUNT; m++)
        bad |= write_method(argv[1], (kvc_method)m);
    return bad;
}
