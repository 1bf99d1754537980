"""From a PyTorch module's tensors to a tree of our parameters."""

import numpy as np
import torch


def randomize(module: torch.nn.Module, seed: int = 0) -> None:
    """Matrices N(0, 1/fan_in), vectors as they are plus N(0, 0.3^2): no parameter is left at 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(p + 0.3 * noise if p.ndim == 1 else noise * p.shape[-1] ** -0.5)


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def linear(module: torch.nn.Linear) -> dict[str, np.ndarray]:
    """nn.Dense of nn.Linear: the kernel is the weight, transposed."""
    dense = {"kernel": array(module.weight).T}
    return dense if module.bias is None else dense | {"bias": array(module.bias)}


def scale(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """A norm's gain."""
    return {"scale": array(module.weight)}
