/*
 * fuzz_context_file.c: any bytes through the reader of context files.
 *
 * The first byte says whether the sum of the tables is put right first, so that what lies behind it
 * is reached too. Besides what the sanitizers see: a walk that is refused says why, one that is not
 * gives as many values as it says, and a second one of the same bytes ends as the first.
 */
#include "fuzz.h"

#include "base/sum.h"
#include "context_sample.h"

#define HEAD_BYTES 72u
#define SUM_OFF    56u

static void require(int holds)
{
    if (!holds)
        __builtin_trap();
}

static bool count(void *arg, const kvctl_file_head *head, uint32_t block, uint32_t part,
                  const uint8_t *bytes)
{
    require(block < head->n_blocks && part < head->n_parts && bytes != NULL);
    ++*(uint64_t *)arg;
    return true;
}

static kvc_status walk_once(uint8_t *bytes, size_t len_bytes)
{
    memory_file file = {.bytes = bytes, .len_bytes = len_bytes};
    uint64_t seen = 0;
    kvctl_file_totals totals;
    const char *why = NULL;
    kvc_status status = kvctl_file_walk(memory_read, &file, NULL, count, &seen, &totals, &why);
    require((status == KVC_OK) == (why == NULL));
    require(status != KVC_OK || totals.n_values == seen);
    return status;
}

static uint64_t get_count(const uint8_t *at)
{
    return (uint64_t)at[0] | (uint64_t)at[1] << 8 | (uint64_t)at[2] << 16 | (uint64_t)at[3] << 24;
}

/* Puts the sum over the head and the tables right, where they are all there. */
static void mend(uint8_t *bytes, size_t len_bytes)
{
    if (len_bytes < HEAD_BYTES)
        return;
    uint64_t n = HEAD_BYTES + get_count(bytes + 44) * 32 + get_count(bytes + 48) * 8 +
                 get_count(bytes + 52) * 4 + get_count(bytes + 64) + get_count(bytes + 68);
    if (n > len_bytes)
        return;
    memset(bytes + SUM_OFF, 0, 8);
    uint64_t sum = kvc_value_sum(bytes, n);
    for (int i = 0; i < 8; i++)
        bytes[SUM_OFF + i] = (uint8_t)(sum >> 8 * i);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size == 0)
        return 0;
    uint8_t *bytes = malloc(size);
    require(bytes != NULL);
    memcpy(bytes, data + 1, size - 1);
    if (data[0] & 1)
        mend(bytes, size - 1);
    kvc_status first = walk_once(bytes, size - 1);
    require(walk_once(bytes, size - 1) == first);
    free(bytes);
    return 0;
}
