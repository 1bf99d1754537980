"""Random weights for a PyTorch module."""

import torch


def randomize(module: torch.nn.Module, seed: int = 0) -> None:
    """Matrices N(0, 1/fan_in), vectors as they are plus N(0, 0.3^2): no parameter is left at 0 or
    1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(p + 0.3 * noise if p.ndim == 1 else noise * p.shape[-1] ** -0.5)
