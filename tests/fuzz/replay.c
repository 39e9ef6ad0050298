/*
 * replay.c: runs the fuzz function over every file of the folders given, without libFuzzer.
 *
 * Fails if a folder holds nothing: then the seeds were not written.
 */
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>

#include "fuzz.h"

#define FILE_BYTES_MAX (1u << 20)

static int run_file(const char *path)
{
    static uint8_t bytes[FILE_BYTES_MAX];
    struct stat info;
    if (stat(path, &info) != 0 || !S_ISREG(info.st_mode))
        return 0;
    FILE *file = fopen(path, "rb");
    if (file == NULL)
        return 0;
    size_t n = fread(bytes, 1, sizeof(bytes), file);
    (void)fclose(file);
    /* Exactly as long as the input, so that a read past its end shows. */
    uint8_t *copy = malloc(n + (n == 0));
    if (copy == NULL)
        return 0;
    for (size_t i = 0; i < n; i++)
        copy[i] = bytes[i];
    (void)LLVMFuzzerTestOneInput(copy, n);
    free(copy);
    return 1;
}

static int run_folder(const char *folder)
{
    char path[4096];
    int n = 0;
    const struct dirent *entry;
    DIR *dir = opendir(folder);
    while (dir != NULL && (entry = readdir(dir)) != NULL) {
        (void)snprintf(path, sizeof(path), "%s/%s", folder, entry->d_name);
        n += run_file(path);
    }
    if (dir != NULL)
        (void)closedir(dir);
    return n;
}

int main(int argc, char **argv)
{
    int n_empty = 0;
    for (int i = 1; i < argc; i++) {
        int n = run_folder(argv[i]);
        printf("%s: %d inputs\n", argv[i], n);
        n_empty += n == 0;
    }
    return argc < 2 || n_empty > 0;
}
