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


def short_conv(module: torch.nn.Conv1d) -> dict[str, np.ndarray]:
    """ShortConv of a depthwise nn.Conv1d, whose weight is (channels, 1, taps)."""
    conv = {"kernel": array(module.weight)[:, 0].T}
    return conv if module.bias is None else conv | {"bias": array(module.bias)}


def split(dense: dict[str, np.ndarray], widths: dict[str, int]) -> dict[str, dict[str, np.ndarray]]:
    """Consecutive output features of one projection or convolution, as several with the given names."""
    ends = np.cumsum(list(widths.values()))
    parts = {k: np.split(x, ends[:-1], axis=-1) for k, x in dense.items()}
    return {name: {k: x[i] for k, x in parts.items()} for i, name in enumerate(widths)}
