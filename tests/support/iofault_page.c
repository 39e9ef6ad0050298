/*
 * iofault_page.c: the test's side of iofault.h. Main thread.
 */
#include "iofault.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

const iofault_sort iofault_sorts[IOFAULT_SORTS] = {
    {IOFAULT_OPEN, EIO, false, "open EIO"},
    {IOFAULT_READ, EIO, false, "read EIO"},
    {IOFAULT_READ, IOFAULT_SHORT, false, "read short"},
    {IOFAULT_WRITE, EIO, false, "write EIO"},
    {IOFAULT_WRITE, ENOSPC, false, "write ENOSPC"},
    {IOFAULT_WRITE, IOFAULT_SHORT, false, "write short"},
    {IOFAULT_WRITE, ENOSPC, true, "write ENOSPC from then on"},
    {IOFAULT_SYNC, EIO, false, "sync EIO"},
    {IOFAULT_SYNC, EIO, true, "sync EIO from then on"},
    {IOFAULT_SIZE, ENOSPC, false, "size ENOSPC"},
    {IOFAULT_SIZE, EIO, false, "size EIO"},
    {IOFAULT_NAME, EIO, false, "name EIO"},
    {IOFAULT_MAP, ENOMEM, false, "map ENOMEM"},
    {IOFAULT_MAP, IOFAULT_SHORT, false, "map SIGBUS"},
};

iofault_page *iofault_arm(const char *folder, const char *under)
{
    char path[600];
    snprintf(path, sizeof path, "%s/iofault", folder);
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0)
        return NULL;
    iofault_page *page = MAP_FAILED;
    if (ftruncate(fd, sizeof *page) == 0)
        page = mmap(NULL, sizeof *page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (page == MAP_FAILED)
        return NULL;
    snprintf(page->under, sizeof page->under, "%s", under);
    /* Under the address sanitizer the program's own library comes second. */
    const char *asan = getenv("ASAN_OPTIONS");
    char options[600];
    snprintf(options, sizeof options, "%s%sverify_asan_link_order=0", asan == NULL ? "" : asan,
             asan == NULL ? "" : ":");
    if (setenv("ASAN_OPTIONS", options, 1) != 0 || setenv(IOFAULT_ENV, path, 1) != 0 ||
        setenv("LD_PRELOAD", IOFAULT_PATH, 1) != 0)
        return NULL;
    return page;
}

void iofault_disarm(void)
{
    (void)unsetenv("LD_PRELOAD");
    (void)unsetenv(IOFAULT_ENV);
}
