/*
 * kvctl_rig.h: what the tests of kvctl share: one daemon with eight blocks of a context, and
 * running kvctl against it.
 */
#ifndef KVCTL_RIG_H
#define KVCTL_RIG_H

#include "store.h"

typedef struct output {
    int status;
    char *out, *err;
} output;

extern store shared;
/* A file with the digests of ten blocks, of which the first eight are there. */
extern char digests_path[300], schema_hex[KVC_DIGEST_HEX_BYTES];

/* All of a file, which is removed then; the caller frees. */
char *read_all(const char *path);
/* Runs kvctl with these words (NULL-terminated), input as its standard input. */
output run(const char *input, const char *const *words);
void expect_text(const char *text, const char *wanted);
/* Runs, checks the exit status and that each text (NULL-terminated) is in the output; frees. */
void expect(const char *input, const char *const *words, int status, const char *const *out,
            const char *err);

#define WORDS(...) ((const char *const[]){__VA_ARGS__, NULL})
#define ON         "--server", shared.tcp_uri

/* Setup and teardown of the group. */
int open_shared(void **state);
int close_shared(void **state);

#endif
