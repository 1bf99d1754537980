"""Published workloads of `document_sums`, for benchmarks and kernel tuning. B is chosen to fill a
device.

G key heads serve H value heads. block_size is None, or the tokens of a block of block-causal sums.
"""

SHAPES = {
    # Linear attention in a vision transformer of 384 channels in 6 heads (DeiT-S's sizes), on an
    # image of 224 x 224 pixels in 14 x 14 patches.
    "vit_s_224": {"B": 64, "T": 196, "G": 6, "H": 6, "K": 64, "V": 64, "block_size": None},
    # LiT-S/2: a DiT of 384 channels with few heads, latents of 32 x 32 in 16 x 16 tokens.
    "lit_s2_256": {"B": 64, "T": 256, "G": 2, "H": 2, "K": 192, "V": 192, "block_size": None},
    # SANA 1.6B (arXiv 2410.10629): width 2240, heads of 32, 1024 x 1024 pixels in 32 x 32 tokens.
    "sana_1.6b": {"B": 8, "T": 1024, "G": 70, "H": 70, "K": 32, "V": 32, "block_size": None},
    # The same width at 64 x 64 tokens, the most of one image.
    "sana_2k": {"B": 2, "T": 4096, "G": 70, "H": 70, "K": 32, "V": 32, "block_size": None},
    # SANA-Video (2509.24695): width 2240, 20 heads of 112; block-causal over blocks of frames.
    "sana_video": {"B": 1, "T": 8192, "G": 20, "H": 20, "K": 112, "V": 112, "block_size": 1024},
    # A laptop's size.
    "small": {"B": 2, "T": 2048, "G": 8, "H": 8, "K": 64, "V": 64, "block_size": None},
}
