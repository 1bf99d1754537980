"""Published workloads of `delta_rule` and `diagonal_plus_low_rank`, for benchmarks and kernel
tuning.

B is chosen to fill a device. G key heads serve H value heads; decay is "none", "per_token" (one per
token and head) or "per_channel" (one per key channel as well).
"""

SHAPES = {
    # DeltaNet (arXiv 2406.06484): 1.3B parameters, width 2048, heads of 128, trained on 2048
    # tokens.
    "delta_net_1.3b": {"B": 8, "T": 2048, "G": 16, "H": 16, "K": 128, "V": 128, "decay": "none"},
    # Gated DeltaNet (2412.06464): 1.3B, width 2400; heads of 256 over 0.75 of the width, values
    # twice as wide.
    "gated_delta_net_1.3b": {
        "B": 4,
        "T": 4096,
        "G": 7,
        "H": 7,
        "K": 256,
        "V": 512,
        "decay": "per_token",
    },
    # Qwen3-Next 80B: 16 key heads, 32 value heads.
    "qwen3_next_80b": {
        "B": 1,
        "T": 8192,
        "G": 16,
        "H": 32,
        "K": 128,
        "V": 128,
        "decay": "per_token",
    },
    # KDA of Kimi Linear 48B (2510.26692): 32 heads, a decay per channel.
    "kimi_linear_48b": {
        "B": 1,
        "T": 8192,
        "G": 32,
        "H": 32,
        "K": 128,
        "V": 128,
        "decay": "per_channel",
    },
    # A laptop's size, and with a decay per channel.
    "small": {"B": 2, "T": 2048, "G": 8, "H": 8, "K": 64, "V": 64, "decay": "per_token"},
    "small_channel": {"B": 2, "T": 2048, "G": 8, "H": 8, "K": 64, "V": 64, "decay": "per_channel"},
}

DIAGONAL_PLUS_LOW_RANK_SHAPES = {
    # RWKV-7 (2503.14456): 1.5B parameters, width 2048, heads of 64, trained on 4096 tokens.
    "rwkv7_1.5b": {"B": 4, "T": 4096, "G": 32, "H": 32, "K": 64, "V": 64, "decay": "per_channel"},
    "small": {"B": 2, "T": 2048, "G": 8, "H": 8, "K": 64, "V": 64, "decay": "per_channel"},
}
