/*
 * blocks.c: which blocks a command is about: --schema, --parts, and digests from words, a file, or
 * computed from token ids.
 *
 * Main thread. Each word that is not understood is named; nothing is guessed.
 */
#include <getopt.h>
#include <stdlib.h>

#include "base/text.h"
#include "kvctl.h"

struct kvctl_key {
    struct kvctl_key *next;
    uint8_t *bytes;
    size_t n;
};

static bool add_key(const char *text, bool is_hex, kvctl_blocks *blocks)
{
    struct kvctl_key *key = calloc(1, sizeof(*key));
    if (key == NULL || !kvctl_key_parse(text, is_hex, &key->bytes, &key->n)) {
        free(key);
        return false;
    }
    key->next = blocks->keys;
    blocks->keys = key;
    blocks->n_keys++;
    return true;
}

/* The digests of the keys, in the order in which they were written. */
static bool digests_from_keys(kvctl_blocks *blocks)
{
    blocks->digests = calloc(blocks->n_keys, sizeof(*blocks->digests));
    blocks->n_digests = blocks->n_keys;
    bool good = blocks->digests != NULL;
    uint32_t i = blocks->n_keys;
    for (const struct kvctl_key *key = blocks->keys; good && key != NULL; key = key->next)
        good = kvc_opaque_key(&blocks->schema.digest, key->bytes, key->n, &blocks->digests[--i]) ==
               KVC_OK;
    if (!good)
        kvctl_error("memory is out");
    return good;
}

bool kvctl_blocks_option(int option, kvctl_blocks *blocks)
{
    switch (option) {
    case 's':
        blocks->has_schema = true;
        return kvctl_schema_read(optarg, &blocks->schema);
    case 'p':
        return kvctl_picks_parse(optarg, &blocks->parts, &blocks->n_parts);
    case 'd':
        blocks->digests_path = optarg;
        return true;
    case 't':
        blocks->tokens_path = optarg;
        return true;
    case 'b':
        return kvctl_number_parse("--block-tokens", optarg, KVC_BLOCK_TOKENS_MIN,
                                  KVC_BLOCK_TOKENS_MAX, &blocks->block_tokens);
    case 'k':
    case 'K':
        return add_key(optarg, option == 'K', blocks);
    default:
        return false;
    }
}

static bool digests_from_words(int argc, char **argv, kvctl_blocks *blocks)
{
    kvc_strbuf words = {0};
    for (int i = optind; i < argc; i++)
        kvc_strbuf_putf(&words, "%s ", argv[i]);
    char *text = kvc_strbuf_take(&words);
    bool good = text != NULL && kvctl_digests_parse(text, &blocks->digests, &blocks->n_digests);
    free(text);
    return good;
}

static bool read_digests(int argc, char **argv, kvctl_blocks *blocks)
{
    if (blocks->n_keys > 0)
        return digests_from_keys(blocks);
    if (optind < argc)
        return digests_from_words(argc, argv, blocks);
    size_t len_bytes;
    const char *path = blocks->tokens_path    ? blocks->tokens_path
                       : blocks->digests_path ? blocks->digests_path
                                              : "-";
    char *text = kvctl_read_file(path, &len_bytes);
    bool good = text != NULL;
    if (good && blocks->tokens_path != NULL)
        good = kvctl_tokens_parse(text, &blocks->schema.digest, (uint32_t)blocks->block_tokens,
                                  &blocks->digests, &blocks->n_digests, &blocks->tokens,
                                  &blocks->n_tokens);
    else if (good)
        good = kvctl_digests_parse(text, &blocks->digests, &blocks->n_digests);
    free(text);
    return good;
}

kvctl_exit kvctl_blocks_read(const char *command, int argc, char **argv, kvctl_blocks *blocks)
{
    if (blocks->block_tokens == 0)
        blocks->block_tokens = kvctl_schema_number(&blocks->schema, "block_tokens");
    bool from_words = optind < argc;
    if (!blocks->has_schema)
        return kvctl_usage(command, "--schema is missing");
    if (from_words + (blocks->digests_path != NULL) + (blocks->tokens_path != NULL) +
            (blocks->n_keys > 0) >
        1)
        return kvctl_usage(command,
                           "digests come from one place: words, --digests, --tokens or --key");
    if (blocks->tokens_path != NULL && blocks->block_tokens == 0)
        return kvctl_usage(command, "--tokens needs --block-tokens, or a file as --schema");
    return read_digests(argc, argv, blocks) ? KVCTL_OK : KVCTL_USAGE;
}

void kvctl_blocks_free(kvctl_blocks *blocks)
{
    for (struct kvctl_key *key = blocks->keys, *next; key != NULL; key = next) {
        next = key->next;
        free(key->bytes);
        free(key);
    }
    free(blocks->schema.text);
    free(blocks->parts);
    free(blocks->digests);
    free(blocks->tokens);
}

kvctl_exit kvctl_blocks_run(const char *command, const kvctl_globals *globals, int argc,
                            char **argv, kvctl_blocks_fn *ask)
{
    static const struct option options[] = {
        KVCTL_BLOCKS_OPTIONS,
        {0},
    };
    kvctl_blocks blocks = {0};
    kvctl_exit result = KVCTL_OK;
    int option;
    while (result == KVCTL_OK && (option = getopt_long(argc, argv, "", options, NULL)) != -1)
        if (!kvctl_blocks_option(option, &blocks))
            result = kvctl_usage(command, "an option is wrong");
    if (result == KVCTL_OK)
        result = kvctl_blocks_read(command, argc, argv, &blocks);
    if (result == KVCTL_OK)
        result = ask(globals, &blocks);
    kvctl_blocks_free(&blocks);
    return result;
}
