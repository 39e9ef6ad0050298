/*
 * digest_test.c: digests against the published vectors, and the rules of schemas.
 *
 * KVASIR_DIGEST_VECTORS names the file. digest_vectors.py checks the same file without this
 * library.
 */
#include "support.h"

#include <locale.h>
#include <math.h>

#include "base/digest.h"

#define PARTS_MAX  8
#define LINE_BYTES 1024

static const char *vectors_path;

/* A schema while its lines are being read; strings live in place. */
struct reading {
    char model[256], revision[256], recipe[256], codecs[PARTS_MAX][256];
    kvc_part parts[PARTS_MAX];
    kvc_schema schema;
};

struct field {
    const char *name;
    size_t offset;
    bool is_double;
};

#define U(name, member)                                                                            \
    {                                                                                              \
        name, offsetof(kvc_part, member), false                                                    \
    }
#define D(name, member)                                                                            \
    {                                                                                              \
        name, offsetof(kvc_part, member), true                                                     \
    }
static const struct field part_fields[] = {
    U("kind", kind),
    U("dtype", dtype),
    U("layer", layer),
    U("kv_head_first", kv_head_first),
    U("kv_head_count", kv_head_count),
    U("row_bytes", row_bytes),
    U("k_off_bytes", k_off_bytes),
    U("k_len_bytes", k_len_bytes),
    U("v_off_bytes", v_off_bytes),
    U("v_len_bytes", v_len_bytes),
    U("q_dim", q_dim),
    U("v_dim", v_dim),
    U("window", window),
    U("sinks", sinks),
    U("rope.type", rope.type),
    U("rope.stored_rotated", rope.stored_rotated),
    U("rope.original_max_position", rope.original_max_position),
    D("rope.theta", rope.theta),
    D("rope.factor", rope.factor),
    D("rope.low_freq_factor", rope.low_freq_factor),
    D("rope.high_freq_factor", rope.high_freq_factor),
    D("attention_scale", attention_scale),
    D("softcap", softcap),
};

static void set_part_field(kvc_part *part, const char *name, const char *value)
{
    for (size_t i = 0; i < sizeof(part_fields) / sizeof(part_fields[0]); i++) {
        if (strcmp(part_fields[i].name, name) != 0)
            continue;
        if (part_fields[i].is_double) {
            double number = strtod(value, NULL);
            memcpy((char *)part + part_fields[i].offset, &number, sizeof(number));
        } else {
            uint32_t number = (uint32_t)strtoul(value, NULL, 10);
            memcpy((char *)part + part_fields[i].offset, &number, sizeof(number));
        }
        return;
    }
    fail_msg("the vectors have an unknown field %s", name);
}

static void read_part(struct reading *reading, char *words)
{
    uint32_t i = reading->schema.n_parts++;
    assert_true(i < PARTS_MAX);
    kvc_part *part = &reading->parts[i];
    *part = (kvc_part){0};
    char *save = NULL;
    char *word = strtok_r(words, " ", &save);
    part->part = (uint32_t)strtoul(word, NULL, 10);
    while ((word = strtok_r(NULL, " ", &save)) != NULL) {
        char *value = strchr(word, '=');
        assert_non_null(value);
        *value++ = '\0';
        if (strcmp(word, "codec") == 0) {
            (void)snprintf(reading->codecs[i], sizeof(reading->codecs[i]), "%s", value);
            part->codec = reading->codecs[i];
        } else {
            set_part_field(part, word, value);
        }
    }
}

static void start_schema(struct reading *reading)
{
    *reading = (struct reading){.schema = {.n_parts = 0}};
    reading->schema.model = reading->model;
    reading->schema.revision = reading->revision;
    reading->schema.recipe = reading->recipe;
    reading->schema.parts = reading->parts;
}

/* first:step:count */
static uint32_t expand_tokens(const char *spec, uint32_t tokens[KVC_BLOCK_TOKENS_MAX])
{
    unsigned first, step, count;
    assert_int_equal(sscanf(spec, "%u:%u:%u", &first, &step, &count), 3);
    assert_true(count <= KVC_BLOCK_TOKENS_MAX);
    for (uint32_t i = 0; i < count; i++)
        tokens[i] = first + i * step;
    return count;
}

static uint32_t read_hex(const char *text, unsigned char *bytes, size_t max_bytes)
{
    uint32_t n = 0;
    for (; strcmp(text, "-") != 0 && *text != '\0'; text += 2) {
        unsigned value;
        assert_true(n < max_bytes);
        assert_int_equal(sscanf(text, "%2x", &value), 1);
        bytes[n++] = (unsigned char)value;
    }
    return n;
}

static void check_digest(const kvc_digest *digest, const char *wanted)
{
    char hex[KVC_DIGEST_HEX_BYTES];
    kvc_digest_hex(digest, hex);
    assert_string_equal(hex, wanted);
}

static void check_block(const char *words)
{
    char schema_hex[128], parent_hex[128], spec[64], extra_hex[256], wanted[128];
    uint32_t tokens[KVC_BLOCK_TOKENS_MAX];
    unsigned char extra[128];
    kvc_digest schema, parent, digest;
    int n = sscanf(words, "schema=%127s parent=%127s tokens=%63s extra=%255s digest=%127s",
                   schema_hex, parent_hex, spec, extra_hex, wanted);
    assert_int_equal(n, 5);
    bool root = strcmp(parent_hex, "-") == 0;
    uint32_t n_tokens = expand_tokens(spec, tokens);
    uint32_t extra_bytes = read_hex(extra_hex, extra, sizeof(extra));
    assert_ok(kvc_digest_parse(schema_hex, &schema));
    if (!root)
        assert_ok(kvc_digest_parse(parent_hex, &parent));
    assert_ok(kvc_block_digest(&schema, root ? NULL : &parent, tokens, n_tokens,
                               extra_bytes == 0 ? NULL : extra, extra_bytes, &digest));
    check_digest(&digest, wanted);
}

static void check_key(const char *words)
{
    char schema_hex[128], key_hex[256], wanted[128];
    unsigned char key[128];
    kvc_digest schema, digest;
    assert_int_equal(
        sscanf(words, "schema=%127s bytes=%255s digest=%127s", schema_hex, key_hex, wanted), 3);
    uint32_t key_bytes = read_hex(key_hex, key, sizeof(key));
    assert_ok(kvc_digest_parse(schema_hex, &schema));
    assert_ok(kvc_key_digest(&schema, key_bytes == 0 ? NULL : key, key_bytes, &digest));
    check_digest(&digest, wanted);
}

/* Takes one line; counts digests in *n_p. */
static void read_line(struct reading *reading, char *line, unsigned *n_p)
{
    line[strcspn(line, "\n")] = '\0';
    char *rest = line + strcspn(line, " ");
    if (*rest == ' ')
        *rest++ = '\0';
    if (strcmp(line, "schema") == 0)
        start_schema(reading);
    else if (strcmp(line, "model") == 0)
        (void)snprintf(reading->model, sizeof(reading->model), "%s", rest);
    else if (strcmp(line, "revision") == 0)
        (void)snprintf(reading->revision, sizeof(reading->revision), "%s", rest);
    else if (strcmp(line, "recipe") == 0)
        (void)snprintf(reading->recipe, sizeof(reading->recipe), "%s", rest);
    else if (strcmp(line, "tp_size") == 0)
        reading->schema.tp_size = (uint32_t)strtoul(rest, NULL, 10);
    else if (strcmp(line, "block_tokens") == 0)
        reading->schema.block_tokens = (uint32_t)strtoul(rest, NULL, 10);
    else if (strcmp(line, "opaque") == 0)
        reading->schema.opaque = (uint32_t)strtoul(rest, NULL, 10);
    else if (strcmp(line, "part") == 0)
        read_part(reading, rest);
    else if (strcmp(line, "key") == 0) {
        check_key(rest);
        (*n_p)++;
    } else if (strcmp(line, "block") == 0) {
        check_block(rest);
        (*n_p)++;
    } else if (strcmp(line, "schema_digest") == 0) {
        kvc_digest digest;
        assert_ok(kvc_schema_digest(&reading->schema, &digest));
        check_digest(&digest, rest);
        (*n_p)++;
    }
}

static void published_vectors(void **state)
{
    (void)state;
    static struct reading reading;
    char line[LINE_BYTES];
    unsigned n = 0;
    FILE *stream = fopen(vectors_path, "re");
    assert_non_null(stream);
    while (fgets(line, sizeof(line), stream) != NULL)
        read_line(&reading, line, &n);
    assert_int_equal(fclose(stream), 0);
    assert_true(n >= 13);
}

static void sha256_of_standard_inputs(void **state)
{
    (void)state;
    kvc_digest digest;
    assert_ok(kvc_sha256(NULL, 0, &digest));
    check_digest(&digest, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    assert_ok(kvc_sha256("abc", 3, &digest));
    check_digest(&digest, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

static void block_digest_refuses_bad_counts(void **state)
{
    (void)state;
    static uint32_t tokens[KVC_BLOCK_TOKENS_MAX + 1];
    kvc_digest schema = {{1}}, digest = {{1}}, zero = {{0}};
    assert_status(kvc_block_digest(&schema, NULL, tokens, 63, NULL, 0, &digest), KVC_INVALID);
    assert_true(kvc_digest_equal(&digest, &zero));
    assert_status(kvc_block_digest(&schema, NULL, tokens, 1025, NULL, 0, &digest), KVC_INVALID);
    assert_status(kvc_block_digest(&schema, NULL, tokens, 64, NULL, 1, &digest), KVC_INVALID);
    assert_ok(kvc_block_digest(&schema, NULL, tokens, 64, NULL, 0, &digest));
}

/* A chain made in place gives what a chain in two variables gives. */
static void block_digest_may_overwrite_its_parent(void **state)
{
    (void)state;
    uint32_t tokens[64] = {5};
    kvc_digest schema = {{1}}, first, second, chain;
    assert_ok(kvc_block_digest(&schema, NULL, tokens, 64, NULL, 0, &first));
    assert_ok(kvc_block_digest(&schema, &first, tokens, 64, NULL, 0, &second));
    chain = first;
    assert_ok(kvc_block_digest(&schema, &chain, tokens, 64, NULL, 0, &chain));
    assert_true(kvc_digest_equal(&chain, &second));
    assert_false(kvc_digest_equal(&first, &second));
}

static void hex_round_trip(void **state)
{
    (void)state;
    kvc_digest digest, back;
    char hex[KVC_DIGEST_HEX_BYTES];
    assert_ok(kvc_sha256("x", 1, &digest));
    kvc_digest_hex(&digest, hex);
    assert_ok(kvc_digest_parse(hex, &back));
    assert_true(kvc_digest_equal(&digest, &back));
    hex[0] = 'A';
    assert_ok(kvc_digest_parse(hex, &back));
    hex[63] = 'g';
    assert_status(kvc_digest_parse(hex, &back), KVC_INVALID);
    hex[63] = '\0';
    assert_status(kvc_digest_parse(hex, &back), KVC_INVALID);
    assert_status(kvc_digest_parse(
                      "00000000000000000000000000000000000000000000000000000000000000000", &back),
                  KVC_INVALID);
}

static kvc_part good_part(void)
{
    return (kvc_part){
        .part = 3,
        .kind = KVC_PART_KV,
        .dtype = KVC_DTYPE_BF16,
        .kv_head_count = 2,
        .row_bytes = 256,
        .k_len_bytes = 128,
        .v_off_bytes = 128,
        .v_len_bytes = 128,
        .q_dim = 32,
        .v_dim = 32,
        .rope = {.type = KVC_ROPE_PLAIN, .theta = 10000},
    };
}

static kvc_schema good_schema(const kvc_part *parts, uint32_t n_parts)
{
    return (kvc_schema){
        .model = "m",
        .revision = "",
        .recipe = "full",
        .tp_size = 1,
        .block_tokens = 64,
        .n_parts = n_parts,
        .parts = parts,
    };
}

static void refused(const kvc_schema *schema, const char *rule)
{
    const char *why = NULL;
    assert_status(kvc_schema_check(schema, KVC_MAX_VALUE_BYTES, &why), KVC_INVALID);
    assert_string_equal(why, rule);
    assert_status(kvc_schema_check(schema, KVC_MAX_VALUE_BYTES, NULL), KVC_INVALID);
}

static void schema_check_names_each_rule(void **state)
{
    (void)state;
    char long_name[KVC_MAX_RECIPE_BYTES + 2];
    memset(long_name, 'x', sizeof(long_name) - 1);
    long_name[sizeof(long_name) - 1] = '\0';
    kvc_part part = good_part();
    const char *why = "unset";
    kvc_schema schema = good_schema(&part, 1);
    assert_ok(kvc_schema_check(&schema, KVC_MAX_VALUE_BYTES, &why));
    assert_null(why);
#define REFUSED(change, rule)                                                                      \
    do {                                                                                           \
        kvc_schema s = good_schema(&part, 1);                                                      \
        s.change;                                                                                  \
        refused(&s, rule);                                                                         \
    } while (0)
    REFUSED(model = "", "model must have 1 to 255 bytes");
    REFUSED(model = NULL, "model must have 1 to 255 bytes");
    REFUSED(model = long_name, "model must have 1 to 255 bytes");
    REFUSED(revision = long_name, "revision must have at most 255 bytes");
    REFUSED(recipe = long_name, "recipe must have 1 to 4096 bytes");
    REFUSED(recipe = "", "recipe must have 1 to 4096 bytes");
    REFUSED(tp_size = 0, "tp_size must not be 0");
    REFUSED(opaque = 2, "opaque must be 0 or 1");
    REFUSED(opaque = 1, "an opaque schema has no parts, and block_tokens 0");
    kvc_schema opaque = good_schema(NULL, 0);
    opaque.opaque = 1;
    refused(&opaque, "an opaque schema has no parts, and block_tokens 0");
    opaque.block_tokens = 0;
    assert_ok(kvc_schema_check(&opaque, KVC_MAX_VALUE_BYTES, NULL));
    REFUSED(block_tokens = 48, "block_tokens must be 64 to 1024");
    REFUSED(block_tokens = 1040, "block_tokens must be 64 to 1024");
    REFUSED(block_tokens = 72, "block_tokens must be a multiple of 16");
    REFUSED(n_parts = 0, "a schema has 1 to 4096 parts");
    REFUSED(n_parts = KVC_MAX_PARTS + 1, "a schema has 1 to 4096 parts");
    REFUSED(parts = NULL, "a schema has 1 to 4096 parts");
#undef REFUSED
}

static void schema_check_names_each_part_rule(void **state)
{
    (void)state;
    char long_name[KVC_MAX_NAME_BYTES + 2];
    memset(long_name, 'x', sizeof(long_name) - 1);
    long_name[sizeof(long_name) - 1] = '\0';
#define REFUSED(change, rule)                                                                      \
    do {                                                                                           \
        kvc_part part = good_part();                                                               \
        part.change;                                                                               \
        kvc_schema s = good_schema(&part, 1);                                                      \
        refused(&s, rule);                                                                         \
    } while (0)
    REFUSED(part = 65536, "part id is above 65535");
    REFUSED(kind = 0, "part kind is unknown");
    REFUSED(kind = 7, "part kind is unknown");
    REFUSED(dtype = 0, "part dtype is unknown");
    REFUSED(dtype = 7, "part dtype is unknown");
    REFUSED(row_bytes = 0, "row_bytes must not be 0");
    REFUSED(row_bytes = 16385, "block_tokens * row_bytes is above max_value_bytes");
    REFUSED(row_bytes = UINT32_MAX, "block_tokens * row_bytes is above max_value_bytes");
    REFUSED(k_off_bytes = 129, "the k slice leaves the row");
    REFUSED(k_off_bytes = UINT32_MAX, "the k slice leaves the row");
    REFUSED(v_off_bytes = 129, "the v slice leaves the row");
    REFUSED(v_len_bytes = UINT32_MAX, "the v slice leaves the row");
    REFUSED(attention_scale = (double)NAN, "attention_scale and softcap must be finite");
    REFUSED(softcap = (double)INFINITY, "attention_scale and softcap must be finite");
    REFUSED(sinks = 2, "sinks must be 0 or 1");
    REFUSED(codec = long_name, "codec is above 255 bytes");
    REFUSED(kv_head_count = 0, "a kv part needs kv_head_count, q_dim and v_dim");
    REFUSED(q_dim = 31, "k_len_bytes must be kv_head_count * q_dim * dtype size");
    REFUSED(kv_head_count = 0x80000001u, "k_len_bytes must be kv_head_count * q_dim * dtype size");
    REFUSED(v_dim = 33, "v_len_bytes must be kv_head_count * v_dim * dtype size");
    REFUSED(rope.type = 0, "rope type is unknown (none has to be said)");
    REFUSED(rope.type = 4, "rope type is unknown (none has to be said)");
    REFUSED(rope.stored_rotated = 2, "stored_rotated must be 0 or 1");
    REFUSED(rope.theta = (double)NAN, "rope factors must be finite");
#undef REFUSED
    kvc_part twins[2] = {good_part(), good_part()};
    kvc_schema schema = good_schema(twins, 2);
    refused(&schema, "two parts have the same id");
    twins[1].part = 4;
    assert_ok(kvc_schema_check(&schema, KVC_MAX_VALUE_BYTES, NULL));
    /* A part of scales and bytes has no K and V to measure. */
    twins[1] = (kvc_part){.part = 9, .kind = KVC_PART_INDEX, .dtype = KVC_DTYPE_I8, .row_bytes = 1};
    assert_ok(kvc_schema_check(&schema, KVC_MAX_VALUE_BYTES, NULL));
}

static void coded_parts_have_rules(void **state)
{
    kvc_part twins[2] = {good_part(), good_part()};
    kvc_schema schema = good_schema(twins, 2);
    (void)state;
    /* A part coded with scales: 2 heads of 32, 68 bytes for K and for V. */
    kvc_part coded = good_part();
    coded.dtype = KVC_DTYPE_E4M3;
    coded.codec = KVC_CODEC_HEAD_SCALES;
    coded.kv_head_count = 2;
    coded.q_dim = coded.v_dim = 32;
    coded.k_off_bytes = 0;
    coded.v_off_bytes = coded.k_len_bytes = coded.v_len_bytes = 68;
    coded.row_bytes = 144;
    twins[1] = coded;
    twins[1].part = 4;
    assert_ok(kvc_schema_check(&schema, KVC_MAX_VALUE_BYTES, NULL));
    twins[1].dtype = KVC_DTYPE_BF16;
    refused(&schema, "codec head-scales needs dtype I8 or E4M3");
    twins[1].dtype = KVC_DTYPE_I8;
    twins[1].v_len_bytes = 64;
    refused(&schema, "v_len_bytes must be kv_head_count * (v_dim + 2) in codec head-scales");
    twins[1].q_dim = UINT32_MAX; /* and 2 more wrap around in 32 bits */
    refused(&schema, "k_len_bytes must be kv_head_count * (q_dim + 2) in codec head-scales");
    /* Scales of no heads, or of heads without elements, are nothing that can be attended over. */
    coded.part = 4;
    coded.kind = KVC_PART_CHUNK_KV;
    twins[1] = coded;
    assert_ok(kvc_schema_check(&schema, KVC_MAX_VALUE_BYTES, NULL));
    twins[1].q_dim = twins[1].v_dim = 0;
    twins[1].k_len_bytes = twins[1].v_len_bytes = 4;
    refused(&schema, "codec head-scales needs kv_head_count, q_dim and v_dim");
    twins[1] = coded;
    twins[1].kv_head_count = twins[1].k_len_bytes = twins[1].v_len_bytes = 0;
    refused(&schema, "codec head-scales needs kv_head_count, q_dim and v_dim");
}

/* Every field is in the text: two values of any of them give two digests. */
static void each_field_changes_the_digest(void **state)
{
    (void)state;
    static const char *const pairs[][3] = {{"kind", "4", "6"},
                                           {"dtype", "1", "2"},
                                           {"row_bytes", "512", "513"},
                                           {"rope.type", "1", "2"}};
    kvc_part part = good_part();
    part.kind = KVC_PART_STATE; /* so that the kv rules allow any number */
    kvc_schema schema = good_schema(&part, 1);
    for (size_t i = 0; i < sizeof(part_fields) / sizeof(part_fields[0]); i++) {
        const char *name = part_fields[i].name, *values[2] = {"0", "1"};
        kvc_part saved = part;
        kvc_digest digests[2];
        for (size_t j = 0; j < sizeof(pairs) / sizeof(pairs[0]); j++) {
            if (strcmp(pairs[j][0], name) == 0)
                memcpy(values, &pairs[j][1], sizeof(values));
        }
        for (int k = 0; k < 2; k++) {
            set_part_field(&part, name, values[k]);
            assert_ok(kvc_schema_digest(&schema, &digests[k]));
        }
        assert_false(kvc_digest_equal(&digests[0], &digests[1]));
        part = saved;
    }
}

static void text_survives_a_comma_locale(void **state)
{
    (void)state;
    kvc_part part = good_part();
    part.softcap = 30.5;
    kvc_schema schema = good_schema(&part, 1);
    kvc_digest before, after;
    assert_ok(kvc_schema_digest(&schema, &before));
    const char *names[] = {"de_DE.UTF-8", "fr_FR.UTF-8", "de_DE.utf8"};
    bool found = false;
    for (size_t i = 0; i < 3 && !found; i++)
        found = setlocale(LC_NUMERIC, names[i]) != NULL;
    if (!found) {
        print_message("no locale with a comma is installed\n");
        skip();
    }
    assert_ok(kvc_schema_digest(&schema, &after));
    (void)setlocale(LC_NUMERIC, "C");
    assert_true(kvc_digest_equal(&before, &after));
}

static void copy_shares_nothing(void **state)
{
    (void)state;
    char codec[] = "esa", model[] = "model";
    kvc_part parts[2] = {good_part(), good_part()};
    parts[1].part = 4;
    parts[1].codec = codec;
    kvc_schema schema = good_schema(parts, 2);
    schema.model = model;
    kvc_digest before, after;
    assert_ok(kvc_schema_digest(&schema, &before));
    kvc_schema *copy = kvc_schema_copy(&schema);
    assert_non_null(copy);
    assert_null(copy->parts[0].codec);
    memset(codec, 'z', 3);
    memset(model, 'z', 5);
    memset(parts, 0, sizeof(parts));
    assert_ok(kvc_schema_digest(copy, &after));
    assert_true(kvc_digest_equal(&before, &after));
    assert_int_equal(copy->parts[1].part, 4);
    free(copy);
}

int main(void)
{
    vectors_path = getenv("KVASIR_DIGEST_VECTORS");
    if (vectors_path == NULL)
        vectors_path = "digest_vectors.txt";
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(published_vectors),
        cmocka_unit_test(sha256_of_standard_inputs),
        cmocka_unit_test(block_digest_refuses_bad_counts),
        cmocka_unit_test(block_digest_may_overwrite_its_parent),
        cmocka_unit_test(hex_round_trip),
        cmocka_unit_test(schema_check_names_each_rule),
        cmocka_unit_test(schema_check_names_each_part_rule),
        cmocka_unit_test(coded_parts_have_rules),
        cmocka_unit_test(each_field_changes_the_digest),
        cmocka_unit_test(text_survives_a_comma_locale),
        cmocka_unit_test(copy_shares_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
