"""Letters of array axes, which names such as `x_BTD`, `q_BTHK` or `S_BHKV` end with, and types.

    B  batch                 H  heads (value heads)      F  features, or feed-forward width
    T  time                  G  key/value groups         W  vocabulary
    D  model width           K  key dim of a head        L  layers
    I  convolution taps      V  value dim of a head      N, C  chunks or blocks, and chunk length
    S  slots of a cache      E  inner width of a mixer   M  memories, or chunks of a block

A name's letters are the array's axes in order, and the letters of einsum strings. No shape comments
are needed.
"""

from typing import Any

import jax

Array = jax.Array
DType = Any  # anything jnp.dtype() takes
State = Any  # a pytree of arrays whose size does not depend on T
LogicalAxes = tuple[str | None, ...]
