"""Tools that compile and read TPU and GPU programs without the hardware."""
