"""Registry of token mixers by name. A new mixer is a file in this folder and a line in _MIXERS.

Each is a class made by `Mixer(d_model=..., **options)`; `base.Mixer` is their interface.
"""

import dataclasses
import importlib
from typing import Any

from seqmodels.mixers.base import Layer, Mixer

# name: (module, class). A module is imported when its mixer is asked for.
_MIXERS = {
    "attention": ("attention", "Attention"),
    "bidirectional": ("bidirectional", "Bidirectional"),
    "delta_net": ("delta_net", "DeltaNet"),
    "delta_product": ("delta_product", "DeltaProduct"),
    "full_attention": ("full_attention", "FullAttention"),
    "gated_delta_net": ("gated_delta_net", "GatedDeltaNet"),
    "gla": ("gla", "GLA"),
    "hgrn": ("hgrn", "HGRN"),
    "hgrn2": ("hgrn2", "HGRN2"),
    "inline": ("inline", "InLine"),
    "inline_causal": ("inline_causal", "InLineCausal"),
    "lawcat": ("lawcat", "LAWCAT"),
    "liger": ("liger", "Liger"),
    "lightnet": ("lightnet", "LightNet"),
    "lightnet_nd": ("lightnet_nd", "LightNetND"),
    "linear_attention": ("linear_attention", "LinearAttention"),
    "linfusion": ("linfusion", "LinFusion"),
    "lion": ("lion", "LION"),
    "lit": ("lit", "LiT"),
    "lolcats": ("lolcats", "LoLCATs"),
    "lru": ("lru", "LRU"),
    "mala": ("mala", "MALA"),
    "mala_causal": ("mala_causal", "MALACausal"),
    "mamba": ("mamba", "Mamba"),
    "mamba2": ("mamba2", "Mamba2"),
    "mate": ("mate", "MATE"),
    "mlp_mixer": ("mlp_mixer", "MLPMixer"),
    "mlp_mixer_causal": ("mlp_mixer_causal", "CausalMLPMixer"),
    "mlstm": ("mlstm", "MLSTM"),
    "mmmamba": ("mmmamba", "MMMamba"),
    "nalaformer": ("nalaformer", "NaLaFormer"),
    "ordered": ("ordered", "Ordered"),
    "rala": ("rala", "RALA"),
    "retnet": ("retnet", "RetNet"),
    "rg_lru": ("rg_lru", "RGLRU"),
    "sana_video": ("sana_video", "SANAVideo"),
    "selective": ("selective", "Selective"),
    "shallow_ffn": ("shallow_ffn", "ShallowFFN"),
    "shallow_ffn_causal": ("shallow_ffn_causal", "CausalShallowFFN"),
    "slab": ("slab", "SLAB"),
    "sparse_linear": ("sparse_linear", "SparseLinear"),
    "sparse_mlp": ("sparse_mlp", "SparseMLP"),
    "sparse_mlp_causal": ("sparse_mlp_causal", "CausalSparseMLP"),
    "transnormer": ("transnormer", "TransNormer"),
    "transnormer_llm": ("transnormer_llm", "TransNormerLLM"),
    "transnormer_local": ("transnormer_local", "TransNormerLocal"),
    "whole_document": ("whole_document", "AffineLinearAttention"),
}


def names() -> list[str]:
    """Returns the name of every registered mixer."""
    return sorted(_MIXERS)


def causal_names() -> list[str]:
    """Returns the name of every mixer whose outputs do not depend on later tokens."""
    return [name for name in names() if mixer_class(name).causal]


def mixer_class(name: str) -> type[Mixer]:
    """Returns the class of the mixer with the registered name `name`.

    Raises ValueError, listing the choices, for a name that is not registered.
    """
    if name not in _MIXERS:
        raise ValueError(f"unknown mixer {name!r}; choose one of {', '.join(names())}")
    module, attribute = _MIXERS[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)


def options(name: str) -> dict[str, Any]:
    """Returns {option: default} of the mixer `name`, without Flax's own fields parent and name.

    A required option, such as d_model, has the default dataclasses.MISSING.
    """
    fields = dataclasses.fields(mixer_class(name))
    return {f.name: f.default for f in fields if f.init and f.name not in ("parent", "name")}


def make(name: str, /, **keywords) -> Mixer:
    """Makes the mixer with the registered name `name`; keywords are its options.

    Raises ValueError, listing the choices, for an unknown mixer or option.
    """
    known = options(name)
    unknown = sorted(set(keywords) - set(known) - {"name", "parent"})
    if unknown:
        raise ValueError(
            f"mixer {name!r} has no option {unknown[0]!r}; it has {', '.join(sorted(known))}"
        )
    return mixer_class(name)(**keywords)


__all__ = ["Layer", "Mixer", "causal_names", "make", "mixer_class", "names", "options"]
