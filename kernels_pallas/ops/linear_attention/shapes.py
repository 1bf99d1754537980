"""Published workloads of `linear_attention`, for benchmarks and kernel tuning. B is chosen to fill
a device.

G key heads serve H value heads. decay is "none", "per_head" (one per head), "per_token" (one per
token and head) or "per_channel" (one per token and key channel).
"""

SHAPES = {
    # RetNet (arXiv 2307.08621): 1.3B parameters, width 2048, 8 heads of 256, values twice as wide.
    "retnet_1.3b": {"B": 8, "T": 2048, "G": 8, "H": 8, "K": 256, "V": 512, "decay": "per_head"},
    # GLA (2312.06635): 1.3B, width 2048, 4 heads over half the width, values over all of it.
    "gla_1.3b": {"B": 8, "T": 2048, "G": 4, "H": 4, "K": 256, "V": 512, "decay": "per_channel"},
    # HGRN2 (2404.07904): 1.3B, width 2048, heads of 128 on both sides.
    "hgrn2_1.3b": {"B": 8, "T": 2048, "G": 16, "H": 16, "K": 128, "V": 128, "decay": "per_channel"},
    # Mamba-2 (2405.21060): 2.7B, width 2560 expanded twice, heads of 64, one group of B and C with
    # 128 states.
    "mamba2_2.7b": {"B": 4, "T": 2048, "G": 1, "H": 80, "K": 128, "V": 64, "decay": "per_token"},
    # xLSTM 7B (2503.13427): width 4096, 8 heads, queries and keys over half the width; one more
    # value column for the normaliser.
    "mlstm_7b": {"B": 1, "T": 8192, "G": 8, "H": 8, "K": 256, "V": 513, "decay": "per_token"},
    # A laptop's size, and with a decay per channel.
    "small": {"B": 2, "T": 2048, "G": 8, "H": 8, "K": 64, "V": 64, "decay": "per_token"},
    "small_channel": {"B": 2, "T": 2048, "G": 8, "H": 8, "K": 64, "V": 64, "decay": "per_channel"},
}
