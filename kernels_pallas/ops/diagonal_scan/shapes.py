"""Published workloads of `diagonal_scan`, for benchmarks and kernel tuning. B is chosen to fill a
device."""

# name: B, T, D (the scan's width), and whether the state is complex.
SHAPES = {
    # Griffin (arXiv 2402.19427): 2B parameters, recurrent width 2560, trained on 2048 tokens.
    "rg_lru_2b": {"B": 8, "T": 2048, "D": 2560, "complex": False},
    # Mamba (arXiv 2312.00752): 1.4B parameters, expanded width 4096 times 16 states.
    "mamba_1.4b": {"B": 1, "T": 2048, "D": 65536, "complex": False},
    # LRU (arXiv 2303.06349) on Path-X of the Long Range Arena: 16384 tokens.
    "lru_path_x": {"B": 8, "T": 16384, "D": 256, "complex": True},
    # A laptop's size.
    "small": {"B": 2, "T": 2048, "D": 256, "complex": False},
}
