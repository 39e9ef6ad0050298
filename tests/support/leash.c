/*
 * leash.c: runs a program that ends when its parent does: leash PROGRAM ARGS...
 *
 * In the program's place, so it is the parent's own child, with its arguments and descriptors. The
 * kernel ends it (SIGKILL) with the parent's thread that started it.
 */
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    if (argc < 2 || prctl(PR_SET_PDEATHSIG, SIGKILL) != 0)
        return 2;
    (void)execv(argv[1], argv + 1);
    return 127;
}
