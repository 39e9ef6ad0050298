/*
 * doctor_machine.c: clock, limits, CPU, memory, kernel and RDMA devices of this machine.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <sys/timex.h>

#include "base/text.h"
#include "doctor.h"
#include "transport/rdma_check.h"

#define LINE_BYTES     256
#define WANTED_FILES   4096u
#define WANTED_MEMLOCK ((uint64_t)64 << 20)
#define WANTED_SHM     ((uint64_t)1 << 30)

static void check_clock(doctor *d)
{
    char source[LINE_BYTES];
    doctor_line("/sys/devices/system/clocksource/clocksource0/current_clocksource", source,
                sizeof(source));
    bool slow = strcmp(source, "hpet") == 0 || strcmp(source, "acpi_pm") == 0;
    if (slow) {
        doctor_report(d, DOCTOR_WARN, "clock", "the clock source is %s, which is slow to read",
                      source);
        doctor_fix(d, "boot with clocksource=tsc where the processor's counter is stable");
    } else {
        doctor_report(d, DOCTOR_OK, "clock", "the clock source is %s",
                      source[0] != '\0' ? source : "the system's");
    }
    struct timex state = {0};
    if (adjtimex(&state) == TIME_ERROR) {
        doctor_report(d, DOCTOR_WARN, "clock", "the time of day is not synchronised");
        doctor_fix(d, "run systemd-timesyncd or chrony: logs and certificates depend on it");
    } else {
        doctor_report(d, DOCTOR_OK, "clock", "the time of day is synchronised");
    }
}

static void check_limit(doctor *d, int which, uint64_t wanted, const char *name, const char *remedy)
{
    struct rlimit limit;
    char have[KVC_TEXT_BYTES];
    if (getrlimit(which, &limit) != 0)
        return;
    if (limit.rlim_cur == RLIM_INFINITY)
        (void)snprintf(have, sizeof(have), "unlimited");
    else if (which == RLIMIT_MEMLOCK)
        (void)kvc_bytes_short(limit.rlim_cur, have);
    else
        (void)snprintf(have, sizeof(have), "%llu", (unsigned long long)limit.rlim_cur);
    if (limit.rlim_cur != RLIM_INFINITY && limit.rlim_cur < wanted) {
        doctor_report(d, DOCTOR_WARN, "limits", "%s: %s", name, have);
        doctor_fix(d, "%s", remedy);
    } else {
        doctor_report(d, DOCTOR_OK, "limits", "%s: %s", name, have);
    }
}

/* Whether a word stands in the flags of the first processor. */
static bool has_flag(const char *flags, const char *flag)
{
    size_t len = strlen(flag);
    for (const char *at = flags; (at = strstr(at, flag)) != NULL; at += len)
        if ((at == flags || at[-1] == ' ') && (at[len] == ' ' || at[len] == '\n'))
            return true;
    return false;
}

static char *cpu_flags(void)
{
    FILE *stream = fopen("/proc/cpuinfo", "re");
    char *line = NULL;
    size_t size = 0;
    bool found = false;
    while (stream != NULL && !found && getline(&line, &size, stream) > 0)
        found = strncmp(line, "flags", 5) == 0;
    if (stream != NULL)
        (void)fclose(stream);
    if (found)
        return line;
    free(line);
    return NULL;
}

static void check_cpu(doctor *d)
{
    char *flags = cpu_flags();
    if (flags == NULL) {
        doctor_report(d, DOCTOR_INFO, "cpu", "no x86 processor: the portable kernels are used");
    } else if (has_flag(flags, "avx512f") && has_flag(flags, "avx512bw") &&
               has_flag(flags, "avx512vl")) {
        doctor_report(d, DOCTOR_OK, "cpu", "AVX-512: the fastest kernels are used");
    } else if (has_flag(flags, "avx2") && has_flag(flags, "fma") && has_flag(flags, "f16c")) {
        doctor_report(d, DOCTOR_OK, "cpu", "AVX2: kernels for it are used");
    } else {
        doctor_report(d, DOCTOR_WARN, "cpu", "neither AVX-512 nor AVX2 with FMA and F16C");
        doctor_fix(d, "workers select and attend with the portable kernels, several times slower; "
                      "a virtual machine may hide what its host has");
    }
    free(flags);
}

static void check_memory(doctor *d)
{
    struct statvfs fs;
    char have[KVC_TEXT_BYTES], line[LINE_BYTES];
    if (statvfs("/dev/shm", &fs) != 0) {
        doctor_report(d, DOCTOR_WARN, "memory", "there is no /dev/shm");
        doctor_fix(d, "mount a tmpfs there: containers take --shm-size");
    } else {
        uint64_t size_bytes = (uint64_t)fs.f_blocks * fs.f_frsize;
        (void)kvc_bytes_short(size_bytes, have);
        bool small = size_bytes < WANTED_SHM;
        doctor_report(d, small ? DOCTOR_INFO : DOCTOR_OK, "memory", "/dev/shm holds %s%s", have,
                      small ? "; dram segments (memfd) do not count against it" : "");
    }
    doctor_line("/sys/kernel/mm/transparent_hugepage/shmem_enabled", line, sizeof(line));
    if (strstr(line, "[never]") != NULL)
        doctor_report(d, DOCTOR_INFO, "memory",
                      "huge pages for shared memory are off; 'advise' in %s speeds dram up",
                      "/sys/kernel/mm/transparent_hugepage/shmem_enabled");
    else if (line[0] != '\0')
        doctor_report(d, DOCTOR_OK, "memory", "huge pages for shared memory are allowed");
}

#ifdef KVASIR_RDMA
static void report_rdma(void *arg, kvt_rdma_level level, const char *text, const char *fix)
{
    static const doctor_level levels[] = {DOCTOR_OK, DOCTOR_INFO, DOCTOR_WARN};
    doctor_report(arg, levels[level], "rdma", "%s", text);
    if (fix[0] != '\0')
        doctor_fix(arg, "%s", fix);
}

static void check_rdma(doctor *d)
{
    kvt_rdma_facts facts;
    static const kvt_rdma_gpu gpus[] = {[DOCTOR_GPU_NONE] = KVT_RDMA_GPU_NONE,
                                        [DOCTOR_GPU_PLAIN] = KVT_RDMA_GPU_PLAIN,
                                        [DOCTOR_GPU_DMABUF] = KVT_RDMA_GPU_DMABUF};
    kvt_rdma_gather(&facts);
    facts.gpu = gpus[d->gpu];
    kvt_rdma_explain(&facts, report_rdma, d);
}
#else
static void check_rdma(doctor *d)
{
    doctor_report(d, DOCTOR_INFO, "rdma", "this kvctl was built without RDMA");
}
#endif

void doctor_check_machine(doctor *d)
{
    check_clock(d);
    check_limit(d, RLIMIT_NOFILE, WANTED_FILES, "open files",
                "ulimit -n 65536, or LimitNOFILE=65536 in the service: each client takes several");
    check_limit(d, RLIMIT_MEMLOCK, WANTED_MEMLOCK, "locked memory",
                "ulimit -l unlimited, or LimitMEMLOCK=infinity in the service: registered memory "
                "(CUDA, RDMA) counts against it");
    check_cpu(d);
    check_memory(d);
    check_rdma(d);
}
