"""Published workloads of `causal_conv`, for benchmarks and kernel tuning. B is chosen to fill a
device."""

# name: B, T, D (channels), I (width).
SHAPES = {
    # Mamba-2 2.7B (arXiv 2405.21060): x, B and C together, 2 * 2560 + 2 * 128 channels.
    "mamba2_2.7b": {"B": 8, "T": 2048, "D": 5376, "I": 4},
    # Gated DeltaNet 1.3B (arXiv 2412.06464): q and k, width 2048.
    "gated_delta_net_1.3b": {"B": 8, "T": 4096, "D": 2048, "I": 4},
    # Griffin 2B (arXiv 2402.19427): before the RG-LRU.
    "rg_lru_2b": {"B": 8, "T": 2048, "D": 2560, "I": 4},
    # The quickstart on a laptop.
    "small": {"B": 8, "T": 512, "D": 256, "I": 4},
}
