#!/usr/bin/env python3
"""Dense decode attention in torch, the baseline of cuda_bench: Llama-3-8B heads, bf16, one query.

For each length and batch prints the median time of scaled_dot_product_attention (enable_gqa) in
microseconds, of each backend that runs; the fastest is the one to beat. Times are of graph replays
over several sets of K and V, larger together than L2, as cuda_bench takes them.

With --prefill: a chunk of queries over picks and itself, without a mask (some 8 % more work).

Usage: dense_sdpa.py [--quick | --prefill]
"""

import statistics
import sys

try:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError:
    print("SKIPPED: no torch")
    sys.exit(77)

HEADS, KV_HEADS, DIM, REPEATS = 32, 8, 128, 15


def attention(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def time_backend(backend, sets):
    """Median, least and greatest microseconds of a call; None where the backend refuses."""
    with sdpa_kernel(backend):
        try:
            for q, k, v in sets:
                attention(q, k, v)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for q, k, v in sets:
                    attention(q, k, v)
        except RuntimeError:
            return None
    times = []
    for _ in range(REPEATS + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(sets))
    times = times[2:]
    return statistics.median(times), min(times), max(times)


def measure(n, batch):
    bytes_of_set = 2 * batch * KV_HEADS * n * DIM * 2
    n_sets = max(2, min(8, (1 << 30) // bytes_of_set))
    sets = []
    for _ in range(n_sets):
        q = torch.randn(batch, HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16)
        k = torch.randn(batch, KV_HEADS, n, DIM, device="cuda", dtype=torch.bfloat16)
        v = torch.randn(batch, KV_HEADS, n, DIM, device="cuda", dtype=torch.bfloat16)
        sets.append((q, k, v))
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        found = time_backend(backend, sets)
        if found:
            print("%8d %5d  dense, %-20s %9.1f %9.1f %9.1f" % (n, batch, backend.name, *found))
            sys.stdout.flush()
    del sets
    torch.cuda.empty_cache()


def measure_chunk(n_list, n_q):
    """Attention of a chunk after n_list keys, as prefill sees it, keys rotated already."""
    visible = n_q * (n_list + (n_q + 1) / 2)
    sets = []
    for _ in range(8):
        q = torch.randn(1, HEADS, n_q, DIM, device="cuda", dtype=torch.bfloat16)
        k, v = (
            torch.randn(1, KV_HEADS, n_list + n_q, DIM, device="cuda", dtype=torch.bfloat16)
            for _ in range(2)
        )
        sets.append((q, k, v))
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        found = time_backend(backend, sets)
        if found:
            rate = 4 * HEADS * DIM * visible / found[0] * 1e-6
            print(
                "%8d %5d  chunk, %-20s %9.1f %9.1f %9.1f  %.0f TFLOP/s of what is visible"
                % (n_list, n_q, backend.name, *found, rate)
            )
            sys.stdout.flush()


def main():
    if not torch.cuda.is_available():
        print("SKIPPED: torch sees no GPU")
        return 77
    print("# torch %s, %s" % (torch.__version__, torch.cuda.get_device_name(0)))
    print("%8s %5s  %-27s %9s %9s %9s" % ("tokens", "seqs", "what", "us", "least", "most"))
    if "--prefill" in sys.argv:
        measure_chunk(2700, 512)
        measure_chunk(3500, 128)
        return 0
    if "--quick" in sys.argv:
        measure(1 << 14, 1)
        return 0
    for log_n, batch in ((17, 1), (19, 1), (20, 1), (22, 1), (17, 8), (20, 8), (17, 32)):
        measure(1 << log_n, batch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
