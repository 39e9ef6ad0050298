/*
 * cuda_conformance.c: the CUDA ops against the CPU oracles. Runs every case, or those named.
 * Exits 0, 1 at the first difference, 2 where a name is no case, 77 without a GPU. Single-threaded.
 */
#include <stdio.h>
#include <string.h>

#include "cuda_cases.h"

typedef struct entry {
    const char *name;
    void (*run)(numbers *from);
} entry;

static const entry entries[] = {
#define ENTRY(name) {#name, cuda_case_##name},
    CUDA_CASES(ENTRY)
#undef ENTRY
};

static bool wanted(const char *name, int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], name) == 0)
            return true;
    }
    return argc == 1;
}

static bool is_case(const char *name)
{
    for (size_t i = 0; i < sizeof(entries) / sizeof(entries[0]); i++) {
        if (strcmp(entries[i].name, name) == 0)
            return true;
    }
    return false;
}

int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        if (!is_case(argv[i])) {
            (void)fprintf(stderr, "no case is called %s\n", argv[i]);
            return 2;
        }
    }
    (void)gpu();
    for (size_t i = 0; i < sizeof(entries) / sizeof(entries[0]); i++) {
        numbers from = {20260 + i};
        if (!wanted(entries[i].name, argc, argv))
            continue;
        entries[i].run(&from);
        release_all();
        printf("ok %s\n", entries[i].name);
        (void)fflush(stdout);
    }
    return 0;
}
