"""Makes models of a config's section `model`: language models, encoders and denoisers."""

import dataclasses
import importlib
import typing
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from seqmodels import fields, mixers
from seqmodels.array_typing import DType
from seqmodels.modules import blocks, pattern, stack

# name: (module, class). A module is imported when its model is asked for.
_ARCHITECTURES = {
    "language_model": ("language_model", "LanguageModel"),
    "encoder": ("encoder", "Encoder"),
    "denoiser": ("denoiser", "Denoiser"),
}
ARCHITECTURES = tuple(_ARCHITECTURES)
_DTYPE_FIELDS = ("dtype", "param_dtype")


def architecture_of(config: Mapping[str, Any]) -> str:
    """Returns the architecture that a config's section `model` names, by default language_model.

    Raises ValueError, listing the choices, for an unknown one.
    """
    name = config.get("architecture", ARCHITECTURES[0])
    if name not in _ARCHITECTURES:
        raise ValueError(
            f"config.model.architecture is {name!r}; choose one of {', '.join(ARCHITECTURES)}"
        )
    return name


def model_class(architecture: str) -> type[stack.Stack]:
    """Returns the class of the models of an architecture."""
    module, attribute = _ARCHITECTURES[architecture]
    return getattr(importlib.import_module(f"seqmodels.{module}"), attribute)


def fields_of(architecture: str) -> dict[str, tuple[Any, Any]]:
    """Returns {field: (type, default)} of a config's section `model`, for one architecture.

    The fields are the model's, with `pattern` and `num_layers` in place of `mixers`, and dtypes by
    name. A field whose default is None and whose type is not optional must be given.
    """
    kind = model_class(architecture)
    kinds = typing.get_type_hints(kind)
    # A class's own fields come before those of its bases, and required ones first.
    own = sorted(dataclasses.fields(kind), key=lambda field: bool(field.kw_only))
    found = {"pattern": (str, None), "num_layers": (int, None)}
    for field in own:
        if field.name in ("mixers", "parent", "name"):
            continue
        default = None if field.default is dataclasses.MISSING else field.default
        found[field.name] = (kinds[field.name], default)
        if default is not None and kinds[field.name] is DType:
            found[field.name] = (str, jnp.dtype(default).name)
    return found


def config_fields() -> dict[str, tuple[Any, Any]]:
    """Returns {field: (type, default)} of a config's section `model`, for all architectures.

    Where several have a field, they agree on its type, and the default is the first that one gives.
    """
    found: dict[str, tuple[Any, Any]] = {"architecture": (str, ARCHITECTURES[0])}
    for name in ARCHITECTURES:
        for field, (kind, default) in fields_of(name).items():
            if field not in found or found[field][1] is None:
                found[field] = kind, default
    return found


def own_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a config's section `model` that its architecture has.

    Raises ValueError, naming it, for a field that no architecture has, or that only another one has
    and that is not at its default.
    """
    architecture = architecture_of(config)
    known, own = config_fields(), fields_of(architecture)
    found = {}
    for name, value in config.items():
        if name in own:
            found[name] = value
        elif name not in known:
            raise ValueError(f"config.model has no field {name!r}; it has {', '.join(own)}")
        elif name != "architecture" and not _is_default(value, known[name][1]):
            raise ValueError(
                f"config.model.{name} is {value!r}, and the architecture {architecture!r} has no "
                f"such field; leave it out, or set config.model.architecture"
            )
    return found


def _is_default(value: Any, default: Any) -> bool:
    return value == default or (default is None and not value)


def from_config(config: Mapping[str, Any]) -> Any:
    """Makes the model that `config`, a config's section `model`, describes.

    Missing fields have the defaults of `fields_of` its architecture.

    Raises:
      ValueError: an unknown field, mixer or option, a value of a wrong type or range or that is not
        among the choices, or a missing required field; the message says what is expected.
    """
    architecture = architecture_of(config)
    kind, known = model_class(architecture), fields_of(architecture)
    values = {name: default for name, (_, default) in known.items()} | own_fields(config)
    # Types, choices and ranges of the model's own fields.
    for name in _DTYPE_FIELDS:
        if not isinstance(values[name], str | None):
            values[name] = jnp.dtype(values[name]).name
    for name, (expected, _) in known.items():
        values[name] = fields.checked(f"config.model.{name}", values[name], expected)
    for name, choices in kind.choices.items():
        if name != "norm" and values[name] not in choices:
            raise ValueError(
                f"config.model.{name} is {values[name]!r}; choose one of {', '.join(choices)}"
            )
    for name in kind.positive:
        if (value := values[name]) is not None and value <= 0:
            least = "at least 1" if isinstance(value, int) else "more than 0"
            raise ValueError(f"config.model.{name} is {value}; it must be {least}")
    # A mixer's options have the types of its fields, or of the model's.
    specs = pattern.layers(values.pop("pattern"), values.pop("num_layers"))
    for spec in specs:
        kinds = typing.get_type_hints(mixers.mixer_class(spec.name))
        kinds |= {name: known[name][0] for name in blocks.LAYER_OPTIONS if name in known}
        for name, value in spec.options:
            what = f"config.model.pattern: {name} of {spec.name}"
            fields.checked(what, value, kinds.get(name, Any))
    for name in _DTYPE_FIELDS:
        if values[name] == "float64" and jnp.result_type(float) != jnp.float64:
            raise ValueError(f"config.model.{name} is 'float64', which needs JAX_ENABLE_X64=1")
        values[name] = jnp.dtype(values[name])
    try:
        model = kind(mixers=specs, **values)
        model.check_layers()
    except ValueError as error:
        named = str(error).startswith("config.model")
        raise ValueError(str(error) if named else f"config.model: {error}") from error
    return model
