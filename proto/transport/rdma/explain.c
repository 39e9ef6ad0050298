/*
 * explain.c: the facts of RDMA on a machine in plain words, each obstacle with what removes it.
 *
 * Pure, any thread.
 */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "transport/rdma_check.h"

#define LEAST_MEMLOCK ((uint64_t)256 << 20) /* some connections, their pools, one dram segment */
#define REGION_BYTES  ((uint64_t)1 << 30)   /* that a connection registers where it may */
#define GOOD_MTU      4096u
#define ROCE_BYTES    60u /* what RoCE's headers take of the interface's MTU */

typedef struct reporter {
    kvt_rdma_report *report;
    void *arg;
} reporter;

static void say(const reporter *r, kvt_rdma_level level, const char *fix, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));

static void say(const reporter *r, kvt_rdma_level level, const char *fix, const char *fmt, ...)
{
    char text[KVT_RDMA_TEXT_BYTES];
    va_list args;
    va_start(args, fmt);
    (void)vsnprintf(text, sizeof(text), fmt, args);
    va_end(args);
    r->report(r->arg, level, text, fix);
}

/* True if there is anything to look at. */
static bool explain_presence(const kvt_rdma_facts *facts, const reporter *r)
{
    if (facts->n_kernel == 0) {
        say(r, KVT_RDMA_INFO, "", "no RDMA device; gRPC is used between machines");
        return false;
    }
    if (!facts->has_uverbs) {
        say(r, KVT_RDMA_WARN,
            "in a container, pass /dev/infiniband to it (--device=/dev/infiniband, or an RDMA "
            "device "
            "plugin in Kubernetes); else: modprobe ib_uverbs",
            "the kernel has RDMA devices (%u), but /dev/infiniband has none of them",
            facts->n_kernel);
        return false;
    }
    if (facts->n_verbs == 0) {
        say(r, KVT_RDMA_WARN, "apt-get install ibverbs-providers, or your vendor's rdma-core",
            "the kernel has RDMA devices (%u), but no driver of libibverbs fits them",
            facts->n_kernel);
        return false;
    }
    if (!facts->has_cm)
        say(r, KVT_RDMA_WARN,
            "modprobe rdma_ucm; in a container, pass /dev/infiniband/rdma_cm to it as well",
            "/dev/infiniband/rdma_cm is missing or may not be opened: no connection can be made");
    return true;
}

static void explain_memlock(const kvt_rdma_facts *facts, const reporter *r)
{
    bool refused = false;
    for (uint32_t i = 0; i < facts->n_ports; i++)
        refused = refused || facts->ports[i].register_errno != 0;
    if (refused || facts->memlock_bytes < LEAST_MEMLOCK)
        say(r, KVT_RDMA_WARN,
            "ulimit -l unlimited, LimitMEMLOCK=infinity in the service, or --ulimit memlock=-1 for "
            "the "
            "container: what RDMA reads and writes is locked in memory",
            "the limit on locked memory is %llu KiB%s",
            (unsigned long long)(facts->memlock_bytes >> 10),
            refused ? ", and 1 MiB could not be registered" : "");
    else if (facts->memlock_bytes / 4 < REGION_BYTES)
        say(r, KVT_RDMA_INFO,
            "ulimit -l unlimited for the worker's process, or its client's region_bytes",
            "of %llu MiB of locked memory, workers' clients take %llu for rows to be written to in "
            "place; of larger regions (a sequence's residency) the rest is copied",
            (unsigned long long)(facts->memlock_bytes >> 20),
            (unsigned long long)(facts->memlock_bytes >> 22));
}

static void explain_mtu(const kvt_rdma_port *port, const reporter *r)
{
    char fix[KVT_RDMA_TEXT_BYTES];
    if (port->infiniband || port->iwarp || port->mtu_bytes >= GOOD_MTU ||
        port->max_mtu_bytes < GOOD_MTU)
        return;
    bool behind = port->netdev_mtu_bytes >= GOOD_MTU + ROCE_BYTES;
    (void)snprintf(fix, sizeof(fix),
                   behind
                       ? "take the device down and up again, so that it takes the interface's MTU "
                         "over: ip link set %s down, then up"
                       : "ip link set %s mtu 4200 on both ends, and as much on the switches "
                         "between: ends that differ lose large packets",
                   port->netdev[0] != '\0' ? port->netdev : "NETDEV");
    say(r, behind ? KVT_RDMA_WARN : KVT_RDMA_INFO, fix,
        "%s port %u sends packets of %u bytes (interface MTU %u); it could send %u", port->device,
        port->number, port->mtu_bytes, port->netdev_mtu_bytes, port->max_mtu_bytes);
}

/* Whether rows can go from a device straight to the GPU's memory. */
static void explain_gpu(const kvt_rdma_facts *facts, const kvt_rdma_port *port, const reporter *r)
{
    if (facts->gpu == KVT_RDMA_GPU_NONE || port->open_errno != 0 || port->number > 1)
        return;
    if (facts->gpu == KVT_RDMA_GPU_DMABUF && port->dmabuf_errno == EBADF)
        say(r, KVT_RDMA_OK, "", "%s writes to the GPU's memory itself (dma-buf)", port->device);
    else if (facts->has_peer_memory)
        say(r, KVT_RDMA_OK, "", "%s writes to the GPU's memory itself (peer memory)", port->device);
    else if (facts->gpu == KVT_RDMA_GPU_PLAIN)
        say(r, KVT_RDMA_INFO,
            "NVIDIA's open kernel modules (driver 515 or later) on Linux 5.12 or later, or: "
            "modprobe "
            "nvidia_peermem",
            "rows for the GPU go through the host's memory: its driver exports no dma-buf, and "
            "there is no peer memory module");
    else
        say(r, KVT_RDMA_INFO,
            "a device whose driver registers dma-bufs (mlx5 on Linux 5.12 or later, rdma-core 34 "
            "or "
            "later), or: modprobe nvidia_peermem",
            "rows for the GPU go through the host's memory: %s takes no dma-buf (%s), and there is "
            "no peer memory module",
            port->device, strerror(port->dmabuf_errno));
}

static void explain_port(const kvt_rdma_port *port, const reporter *r)
{
    char fix[KVT_RDMA_TEXT_BYTES];
    const char *netdev = port->netdev[0] != '\0' ? port->netdev : "its interface";
    if (port->open_errno != 0) {
        say(r, KVT_RDMA_WARN,
            "let the service's user read and write /dev/infiniband/uverbs* (group rdma, or the "
            "container's device rules)",
            "%s cannot be opened: %s", port->device, strerror(port->open_errno));
        return;
    }
    if (!port->active) {
        (void)snprintf(fix, sizeof(fix), "%s%s%s", port->infiniband ? "" : "ip link set ",
                       port->infiniband ? "check the cable and that a subnet manager (opensm) runs"
                                        : netdev,
                       port->infiniband ? "" : " up; then check cable and switch");
        say(r, KVT_RDMA_WARN, fix, "%s port %u: the link is down", port->device, port->number);
        return;
    }
    if (port->n_gids == 0 && !port->iwarp && !port->infiniband) {
        (void)snprintf(fix, sizeof(fix), "ip addr add ADDRESS/PREFIX dev %s", netdev);
        say(r, KVT_RDMA_WARN, fix,
            "%s port %u has no usable GID: %s has no IP address but the link-local one",
            port->device, port->number, netdev);
        return;
    }
    say(r, KVT_RDMA_OK, "", "%s port %u (%s) is up%s%s", port->device, port->number,
        port->iwarp ? "iWARP" : (port->infiniband ? "InfiniBand" : "RoCE"),
        port->netdev[0] != '\0' ? ", on " : "", port->netdev);
    explain_mtu(port, r);
}

void kvt_rdma_explain(const kvt_rdma_facts *facts, kvt_rdma_report *report, void *arg)
{
    reporter r = {report, arg};
    if (!explain_presence(facts, &r))
        return;
    explain_memlock(facts, &r);
    for (uint32_t i = 0; i < facts->n_ports; i++) {
        explain_port(&facts->ports[i], &r);
        explain_gpu(facts, &facts->ports[i], &r);
    }
}
