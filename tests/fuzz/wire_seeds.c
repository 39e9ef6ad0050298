/*
 * wire_seeds.c: writes one seed per method and direction, and a few broken ones, to a folder.
 *
 * Usage: wire_seeds FOLDER. Files go to FOLDER/request and FOLDER/reply.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "base/arena.h"
#include "samples.h"
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
        make_folder(argv[1], "reply"))
        return 1;
    for (int m = 0; m < KVC_METHOD_COUNT; m++)
        bad |= write_method(argv[1], (kvc_method)m);
    return bad;
}
