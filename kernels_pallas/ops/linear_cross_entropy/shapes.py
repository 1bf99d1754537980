"""Published workloads of `linear_cross_entropy`, for benchmarks. B is chosen to fill a device."""

# name: B, T, D (width), W (vocabulary), and the logits' soft cap.
SHAPES = {
    # Llama 3 8B (arXiv 2407.21783): width 4096, 128256 words, 8192 tokens.
    "llama3_8b": {"B": 1, "T": 8192, "D": 4096, "W": 128256, "softcap": None},
    # Gemma 2 2B (arXiv 2408.00118): width 2304, 256128 words, logits capped at 30.
    "gemma2_2b": {"B": 1, "T": 8192, "D": 2304, "W": 256128, "softcap": 30.0},
    # Mamba 1.4B (arXiv 2312.00752): width 2048, 50280 words, 2048 tokens.
    "mamba_1.4b": {"B": 8, "T": 2048, "D": 2048, "W": 50280, "softcap": None},
    # A laptop's size.
    "small": {"B": 4, "T": 512, "D": 256, "W": 8192, "softcap": None},
}
