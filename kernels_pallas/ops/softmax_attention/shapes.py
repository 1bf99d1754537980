"""Published workloads of `softmax_attention`, for benchmarks and kernel tuning. B is chosen to fill
a device."""

# name: B, T, query heads H, key/value heads G, head dim K = V, window.
SHAPES = {
    # Llama 3 8B (arXiv 2407.21783): 32 query heads in 8 groups of width 128, 8192 tokens.
    "llama3_8b": {"B": 1, "T": 8192, "H": 32, "G": 8, "K": 128, "window": None},
    # Mistral 7B (arXiv 2310.06825): the same heads, a window of 4096.
    "mistral_7b": {"B": 1, "T": 8192, "H": 32, "G": 8, "K": 128, "window": 4096},
    # Griffin (arXiv 2402.19427): multi-query local attention of head width 128, a window of 1024.
    "griffin_2b": {"B": 8, "T": 2048, "H": 20, "G": 1, "K": 128, "window": 1024},
    # The quickstart on a laptop.
    "small": {"B": 8, "T": 512, "H": 4, "G": 4, "K": 32, "window": 128},
}
