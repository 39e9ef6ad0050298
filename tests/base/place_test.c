/*
 * place_test.c: placement against the published vectors, and what it promises of any list of
 * servers: even shares, no dependence on order, and that a new server takes blocks for itself only.
 *
 * KVASIR_PLACE_VECTORS names the file. place_vectors.py checks the same file without this library.
 */
#include "support.h"

#include "base/digest.h"
#include "base/place.h"

#define LINE_BYTES  1024
#define MAX_SERVERS 16
#define N_BLOCKS    20000u

static const char *vectors_path;

static uint64_t key_of(const char *name)
{
    uint64_t key = 0;
    assert_ok(kvc_place_key(name, &key));
    return key;
}

static void check_key(char *rest)
{
    char *hex = strrchr(rest, ' ');
    assert_non_null(hex);
    *hex++ = '\0';
    uint64_t want = strtoull(hex, NULL, 16);
    if (key_of(rest) != want)
        fail_msg("the key of %s is another", rest);
}

static void check_owner(char *rest)
{
    const char *names[MAX_SERVERS];
    uint64_t keys[MAX_SERVERS];
    uint32_t n = 0;
    kvc_digest digest;
    char *save = NULL, *hex = strtok_r(rest, " ", &save), *list = strtok_r(NULL, " ", &save);
    const char *want = strtok_r(NULL, " ", &save);
    assert_true(hex != NULL && list != NULL && want != NULL);
    assert_ok(kvc_digest_parse(hex, &digest));
    save = NULL;
    for (char *name = strtok_r(list, ",", &save); name; name = strtok_r(NULL, ",", &save)) {
        assert_true(n < MAX_SERVERS);
        keys[n] = key_of(name);
        names[n++] = name;
    }
    assert_true(n > 0);
    assert_string_equal(names[kvc_place_owner(keys, n, &digest)], want);
}

static void the_published_vectors_hold(void **state)
{
    char line[LINE_BYTES];
    uint32_t n_keys = 0, n_owners = 0;
    FILE *file = fopen(vectors_path, "re");
    (void)state;
    assert_non_null(file);
    while (fgets(line, sizeof(line), file) != NULL) {
        line[strcspn(line, "\n")] = '\0';
        if (strncmp(line, "key ", 4) == 0) {
            check_key(line + 4);
            n_keys++;
        } else if (strncmp(line, "owner ", 6) == 0) {
            check_owner(line + 6);
            n_owners++;
        }
    }
    (void)fclose(file);
    assert_true(n_keys >= 7 && n_owners >= 90);
}

static void make_keys(uint64_t *keys, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        char name[16];
        (void)snprintf(name, sizeof(name), "%u", i);
        keys[i] = key_of(name);
    }
}

static kvc_digest digest_of(uint32_t i)
{
    kvc_digest digest;
    assert_ok(kvc_sha256(&i, sizeof(i), &digest));
    return digest;
}

/* 20,000 blocks over n: a share is 20,000 / n give or take five of its standard deviations. */
static void shares_are_even(void **state)
{
    uint64_t keys[MAX_SERVERS];
    (void)state;
    make_keys(keys, MAX_SERVERS);
    for (uint32_t n = 1; n <= MAX_SERVERS; n++) {
        uint32_t count[MAX_SERVERS] = {0};
        for (uint32_t i = 0; i < N_BLOCKS; i++) {
            kvc_digest digest = digest_of(i);
            count[kvc_place_owner(keys, n, &digest)]++;
        }
        double share = (double)N_BLOCKS / n;
        for (uint32_t s = 0; s < n; s++) {
            double off = count[s] - share;
            if (off * off > 25 * share)
                fail_msg("%u of %u servers has %u blocks, %.0f would be its share", s, n, count[s],
                         share);
        }
    }
}

static void a_new_server_takes_its_share_and_moves_no_other_block(void **state)
{
    uint64_t keys[MAX_SERVERS];
    (void)state;
    make_keys(keys, MAX_SERVERS);
    for (uint32_t n = 1; n < 9; n++) {
        uint32_t moved = 0;
        for (uint32_t i = 0; i < N_BLOCKS; i++) {
            kvc_digest digest = digest_of(i);
            uint32_t before = kvc_place_owner(keys, n, &digest);
            uint32_t after = kvc_place_owner(keys, n + 1, &digest);
            if (after != before) {
                assert_int_equal(after, n);
                moved++;
            }
        }
        double share = (double)N_BLOCKS / (n + 1), off = moved - share;
        assert_true(off * off <= 25 * share);
    }
}

static void the_order_of_the_list_does_not_matter(void **state)
{
    uint64_t keys[8], other[8];
    (void)state;
    make_keys(keys, 8);
    for (uint32_t i = 0; i < 8; i++)
        other[i] = keys[(i * 3 + 5) % 8];
    for (uint32_t i = 0; i < 2000; i++) {
        kvc_digest digest = digest_of(i);
        assert_true(keys[kvc_place_owner(keys, 8, &digest)] ==
                    other[kvc_place_owner(other, 8, &digest)]);
    }
}

static void names_have_rules(void **state)
{
    char name[KVC_MAX_NAME_BYTES + 2];
    uint64_t key;
    (void)state;
    memset(name, 'x', sizeof(name));
    name[KVC_MAX_NAME_BYTES + 1] = '\0';
    key = 7;
    assert_status(kvc_place_key(name, &key), KVC_INVALID);
    assert_int_equal(key, 0);
    key = 7;
    assert_status(kvc_place_key("", &key), KVC_INVALID);
    assert_int_equal(key, 0);
    name[KVC_MAX_NAME_BYTES] = '\0';
    assert_ok(kvc_place_key(name, &key));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_published_vectors_hold),
        cmocka_unit_test(shares_are_even),
        cmocka_unit_test(a_new_server_takes_its_share_and_moves_no_other_block),
        cmocka_unit_test(the_order_of_the_list_does_not_matter),
        cmocka_unit_test(names_have_rules),
    };
    vectors_path = getenv("KVASIR_PLACE_VECTORS");
    if (vectors_path == NULL) {
        (void)fprintf(stderr, "KVASIR_PLACE_VECTORS is not set\n");
        return 1;
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
