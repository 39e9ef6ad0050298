"""The C structs of kvw/worker.h, kvc/client.h and kvc/types.h, field for field, and the calls.

Order and types here must be those of the headers; tests/worker/python compares every offset with
what the C compiler says. Strings are bytes that the caller keeps alive until the call returns.
"""

import ctypes as C

u8p, u32p, f32p = C.POINTER(C.c_uint8), C.POINTER(C.c_uint32), C.POINTER(C.c_float)

DTYPE_F32, DTYPE_F16, DTYPE_BF16 = 1, 2, 3
POLICY = {"fail": 1, "drop": 2}
PROMISE = {"memory": 1, "durable": 2}
INDEX = {"exact": 1, "compressed": 2, "reranked": 3}
ROW_DTYPE = {"e4m3": 6, "i8": 7}
ROPE_PLAIN, ROPE_LLAMA3 = 0, 1


class Digest(C.Structure):
    _fields_ = [("bytes", C.c_uint8 * 32)]


class RopeParams(C.Structure):
    _fields_ = [
        ("type", C.c_uint32),
        ("theta", C.c_double),
        ("factor", C.c_double),
        ("low_freq_factor", C.c_double),
        ("high_freq_factor", C.c_double),
        ("original_max_position", C.c_uint32),
    ]


ALL_REDUCE = C.CFUNCTYPE(C.c_int, C.c_void_p, C.c_char_p, f32p, C.c_uint32)


class WorkerOpts(C.Structure):
    _fields_ = [
        ("size_bytes", C.c_size_t),
        ("model", C.c_char_p),
        ("revision", C.c_char_p),
        ("n_layers", C.c_uint32),
        ("n_q_heads", C.c_uint32),
        ("n_kv_heads", C.c_uint32),
        ("head_dim", C.c_uint32),
        ("dtype", C.c_int),
        ("rope", RopeParams),
        ("attention_scale", C.c_float),
        ("tp_size", C.c_uint32),
        ("tp_rank", C.c_uint32),
        ("client", C.c_void_p),
        ("block_tokens", C.c_uint32),
        ("promise", C.c_int),
        ("fetch_timeout_ns", C.c_uint64),
        ("policy", C.c_int),
        ("backend", C.c_char_p),
        ("n_threads", C.c_uint32),
        ("selector", C.c_char_p),
        ("index", C.c_int),
        ("projection_path", C.c_char_p),
        ("n_sink", C.c_uint32),
        ("n_recent", C.c_uint32),
        ("k", C.c_uint32),
        ("eps", C.c_uint32),
        ("chunk_tokens", C.c_uint32),
        ("far_position", C.c_uint32),
        ("reselect_cos", C.c_double),
        ("all_reduce", ALL_REDUCE),
        ("all_reduce_arg", C.c_void_p),
        ("residency_slots", C.c_uint32),
        ("exact", C.c_uint32),
        ("index_dims", C.c_uint32),
        ("rerank_dims", C.c_uint32),
        ("rerank_factor", C.c_uint32),
        ("put_window", C.c_uint32),
        ("put_timeout_ns", C.c_uint64),
        ("reuse_any", C.c_uint32),
        ("way", C.c_char_p),
        ("landmark_dim", C.c_uint64),
        ("clients", C.POINTER(C.c_void_p)),
        ("server_names", C.POINTER(C.c_char_p)),
        ("n_clients", C.c_uint64),
        ("max_tokens", C.c_uint32),
        ("device_memory", C.c_uint32),
        ("retrieval_queries", C.c_uint64),
        ("row_dtype", C.c_uint64),
    ]


class SeqOpts(C.Structure):
    _fields_ = [
        ("size_bytes", C.c_size_t),
        ("tokens", u32p),
        ("n_tokens", C.c_uint32),
        ("adapter", C.c_char_p),
        ("salt", C.c_char_p),
        ("stream", C.c_void_p),
    ]


class WorkerStats(C.Structure):
    _fields_ = [("size_bytes", C.c_size_t)] + [
        (name, C.c_uint64)
        for name in (
            "tokens tokens_reused steps reselects picks hits misses rows_gpu rows_dram rows_lmdb "
            "rows_dropped bytes_fetched bytes_put requests blocks_put blocks_existed "
            "index_rows_rebuilt bytes_index bytes_residency bytes_window ns_select ns_fetch_wait "
            "ns_attend ns_append full_steps put_retries ns_put_wait rows_near way_fallbacks "
            "steps_device host_syncs bytes_device bytes_near rows_ahead"
        ).split()
    ]


class SeqServerStats(C.Structure):
    _fields_ = [("size_bytes", C.c_size_t), ("name", C.c_char_p)] + [
        (name, C.c_uint64)
        for name in "blocks rows bytes requests rows_near rows_missing lost".split()
    ]


class ClientOpts(C.Structure):
    _fields_ = [
        ("size_bytes", C.c_size_t),
        ("uris", C.c_char_p),
        ("connect_timeout_ns", C.c_uint64),
        ("default_timeout_ns", C.c_uint64),
        ("n_channels", C.c_uint32),
        ("sums", C.c_uint64),
        ("region_bytes", C.c_uint64),
    ]


class Limits(C.Structure):
    _fields_ = [
        ("max_value_bytes", C.c_uint32),
        ("max_message_bytes", C.c_uint32),
        ("max_batch_values", C.c_uint32),
        ("max_digests", C.c_uint32),
        ("max_context_blocks", C.c_uint32),
        ("max_picks", C.c_uint32),
        ("max_groups", C.c_uint32),
        ("max_contexts", C.c_uint32),
        ("max_ttl_ms", C.c_uint64),
        ("max_attend_queries", C.c_uint32),
        ("max_attend_calls", C.c_uint32),
        ("max_pieces", C.c_uint32),
        ("max_open_blocks", C.c_uint64),
        ("max_holds", C.c_uint32),
        ("max_schemas", C.c_uint32),
        ("max_hold_bytes", C.c_uint64),
        ("max_map_pin_bytes", C.c_uint64),
        ("max_mapped_bytes", C.c_uint64),
        ("max_saved_tenant_bytes", C.c_uint64),
        ("max_inflight_bytes", C.c_uint64),
        ("max_put_window_bytes", C.c_uint64),
        ("max_put_window_values", C.c_uint32),
        ("max_saved", C.c_uint32),
        ("max_calls", C.c_uint32),
        ("max_connections", C.c_uint32),
    ]


class TierStats(C.Structure):
    _fields_ = [
        ("name", C.c_char_p),
        ("capacity_bytes", C.c_uint64),
        ("used_bytes", C.c_uint64),
        ("values", C.c_uint64),
        ("rows_read", C.c_uint64),
        ("bytes_read", C.c_uint64),
        ("bytes_written", C.c_uint64),
        ("evictions", C.c_uint64),
    ]


class NamedCount(C.Structure):
    _fields_ = [("name", C.c_char_p), ("value", C.c_uint64)]


class ServerStats(C.Structure):
    _fields_ = [
        ("size_bytes", C.c_size_t),
        ("version", C.c_char_p),
        ("boot_id", C.c_uint64),
        ("uptime_ms", C.c_uint64),
        ("limits", C.POINTER(Limits)),
        ("n_tiers", C.c_uint32),
        ("n_counters", C.c_uint32),
        ("n_schemas", C.c_uint32),
        ("tiers", C.POINTER(TierStats)),
        ("counters", C.POINTER(NamedCount)),
        ("schemas", C.POINTER(Digest)),
        ("opaque", C.POINTER(C.c_uint8)),
    ]


# C name of each struct, for the test that compares layouts.
STRUCTS = {
    "kvc_digest": Digest,
    "kvk_rope_params": RopeParams,
    "kvw_opts": WorkerOpts,
    "kvw_seq_opts": SeqOpts,
    "kvw_stats": WorkerStats,
    "kvw_server_stats": SeqServerStats,
    "kvc_client_opts": ClientOpts,
    "kvc_limits": Limits,
    "kvc_tier_stats": TierStats,
    "kvc_named_count": NamedCount,
    "kvc_server_stats": ServerStats,
}

_vp, _vpp, _u32, _u64, _int = C.c_void_p, C.POINTER(C.c_void_p), C.c_uint32, C.c_uint64, C.c_int

# name: (result, arguments). c_int results are statuses and are checked.
CALLS = {
    "kvc_client_open": (_int, [C.POINTER(ClientOpts), _vpp]),
    "kvc_client_close": (None, [_vp]),
    "kvc_client_limits": (C.POINTER(Limits), [_vp]),
    "kvc_last_error": (C.c_char_p, []),
    "kvc_stats": (_int, [_vp, _u64, C.POINTER(C.POINTER(ServerStats))]),
    "kvc_process_counts": (C.c_uint32, [C.POINTER(NamedCount), C.c_uint32]),
    "kvc_stats_free": (None, [C.POINTER(ServerStats)]),
    "kvw_open": (_int, [C.POINTER(WorkerOpts), _vpp]),
    "kvw_close": (None, [_vp]),
    "kvw_last_error": (C.c_char_p, []),
    "kvw_schema_digest": (C.POINTER(Digest), [_vp]),
    "kvw_seq_open": (_int, [_vp, C.POINTER(SeqOpts), _vpp, u32p]),
    "kvw_seq_destroy": (None, [_vp]),
    "kvw_seq_tokens": (_u64, [_vp]),
    "kvw_tokens": (_int, [_vp, u32p, _u32]),
    "kvw_truncate": (_int, [_vp, _u64]),
    "kvw_append": (_int, [_vp, _u32, _vp, _vp, _u32]),
    "kvw_append_chunks": (_int, [_vp, _u32, _vp, _vp, _vp, _u32]),
    "kvw_retriever_open": (_int, [_vp, _u32, _u32, _vpp]),
    "kvw_retriever_close": (None, [_vp]),
    "kvw_retrieve": (_int, [_vp, _vp, _u64]),
    "kvw_retrieved": (_int, [_vp, C.POINTER(u32p), C.POINTER(f32p), C.POINTER(f32p), u32p]),
    "kvw_retriever_attend": (_int, [_vp, _vp, _u32, _vp]),
    "kvw_step_begin": (_int, [_vp, _u32, _vp, _u32, _vpp]),
    "kvw_step_attend": (_int, [_vp, _vp]),
    "kvw_step_finish": (_int, [_vp, _vp, _vp, _vp]),
    "kvw_step_abandon": (None, [_vp]),
    "kvw_forward": (_int, [_vp, _u32, _vp, _vp, _vp, _u32, _vp, _vp]),
    "kvw_batch_open": (_int, [_vp, _u32, _vp, _vpp]),
    "kvw_batch_close": (None, [_vp]),
    "kvw_batch_forward": (_int, [_vp, _vpp, _u32, _u32, _vp, _vp, _vp, _vp, _vp]),
    "kvw_flush": (_int, [_vp, _u64]),
    "kvw_last_picks": (_int, [_vp, _u32, C.POINTER(u32p), u32p]),
    "kvw_seq_stats": (_int, [_vp, C.POINTER(WorkerStats)]),
    "kvw_seq_server_stats": (_int, [_vp, C.c_uint32, C.POINTER(SeqServerStats)]),
}
