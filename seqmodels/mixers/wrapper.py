"""Base class of mixers that run another mixer, which is named in an option as a pattern is."""

import flax.linen as nn

from seqmodels import mixers
from seqmodels.mixers import base
from seqmodels.modules import pattern


class Wrapper(base.WholeDocumentMixer):
    """A mixer of whole documents that runs another one, for its subclasses to say how.

    Attributes:
      mixer: the other mixer and its options, as in a pattern: "gla" or "gla(num_heads=2)". Width,
        dtypes and implementation are the wrapper's, unless the options set them.
    """

    mixer: str = "gla"

    @nn.nowrap
    def spec(self) -> pattern.MixerSpec:
        """Returns the wrapped mixer's name and options; raises ValueError unless there is one."""
        specs = pattern.parse(self.mixer)
        if len(specs) != 1:
            raise ValueError(
                f"{base.name_of(self)}: mixer is {self.mixer!r}, which names {len(specs)} mixers; "
                "it takes one, such as 'gla(num_heads=2)', and a pattern of several layers has one "
                f"{base.name_of(self)} for each"
            )
        return specs[0]

    @nn.nowrap
    def make_wrapped(self, **keywords) -> base.Mixer:
        """Makes the wrapped mixer, on the wrapper's grid if it has one; keywords: its other fields.

        Raises ValueError, listing the choices, for an unknown mixer or option.
        """
        spec = self.spec()
        own = dict(spec.options)
        for field in ("d_model", "dtype", "param_dtype", "implementation", "grid"):
            if field != "grid" or field in mixers.options(spec.name):
                own.setdefault(field, getattr(self, field))
        return mixers.make(spec.name, **own, **keywords)

    def lower_bound_width(self) -> int:
        """Returns the width of `Layer.lower_bound_D` that the wrapped mixer reads."""
        return self.make_wrapped(parent=None).lower_bound_width()
