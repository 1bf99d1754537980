"""Registers published architectures by the `model_type` of their config.json.

To add one, write `<family>.py` with an `ARCHITECTURE`, and name the file in `_MODULES`. It has:

- `model_config(config)`: config.json to the dict that `language_model.from_config` takes, without
  dtypes. `HFConfig` reads fields and refuses hostile values by name; a table of `parts.Field`
  serves both directions. Raise ValueError for what we cannot compute. Layers that differ go into
  the pattern: `pattern.to_text` writes a list of MixerSpec as one.
- `hf_config(model, specs)`: the inverse, as far as the family can express it. It need not check
  that: its result is read back with `model_config`, and the export refused if that is another
  model. `model` has every field of config.model, defaults too.
- `rules(model, specs)`: a `rules.Rule` for every tensor. `checkpoints_io.rules` and `parts` have
  the usual ones. Layers are "block_{i}" for all i, scanned or not.
- `ignored`: regular expressions (full match) of tensors that files may have and we do not read.

Streaming tensors through the rules both ways, stacking scanned layers, casting, sharding, and
finding missing, extra and misshapen tensors is common code. Test a family against transformers'
model with `tests/seqmodels/checkpoints_io/oracle_suite.py`: logits to 1e-4, and files that are
byte-equal after a round trip.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from seqmodels.checkpoints_io.rules import Rule
from seqmodels.modules.pattern import MixerSpec

# Each is a module here of the same name.
_MODULES = (
    "bamba", "delta_net", "gated_deltanet", "gla", "gpt2", "hgrn2", "llama", "mamba", "mamba2",
    "minimax", "mistral", "qwen2", "qwen3", "qwen3_next", "recurrent_gemma", "retnet", "smollm3",
    "xlstm",
)  # fmt: skip
_MOST_LAYERS, _LARGEST = 10_000, 2**31
# Fields whose null is a value: as many key heads as query heads, and no window.
_NULLABLE = ("num_key_value_heads", "sliding_window")
_ROTARY_BUFFERS = (r".*rotary_emb\.inv_freq",)
# Fields that change what is computed and that no architecture here reads, with the values that
# change nothing.
_UNSUPPORTED = {
    "quantization_config": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "query_pre_attn_scalar": None,
    "attention_multiplier": None,
    "logit_scale": None,
    "logits_scaling": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "use_qk_norm": False,
    "rope_interleaved": False,
    "alibi": False,
}


class HFConfig:
    """Fields of a config.json, checked as they are read; `name` is the file, for error messages.

    Methods that read a field take a default for one that is absent or null; without a default such
    a field is an error. All raise ValueError for a value of another kind.
    """

    def __init__(self, fields: dict[str, Any], name: str):
        self.fields, self.name = fields, name

    def with_defaults(self, **fields) -> "HFConfig":
        """Returns a copy in which absent or null fields have these values.

        Null key heads and a null window stay, as null is a value of these fields.
        """
        present = {k: v for k, v in self.fields.items() if v is not None or k in _NULLABLE}
        return HFConfig(fields | present, self.name)

    def integer(self, field: str, default: int | None = None) -> int:
        """Reads an integer from 1 to 2^31, or to 10,000 if it counts layers or blocks."""
        most = _MOST_LAYERS if "layer" in field or "block" in field else _LARGEST
        what = f"a positive integer up to {most}"
        return self._checked(field, default, lambda v: type(v) is int and 0 < v <= most, what)

    def optional_integer(self, field: str) -> int | None:
        """Reads a positive integer; returns None if the field is null or absent."""
        return None if self.get(field) is None else self.integer(field)

    def number(self, field: str, default: float | None = None) -> float:

        def is_right(value):
            return type(value) in (int, float) and abs(value) < 1e30

        return float(self._checked(field, default, is_right, "a number"))

    def positive(self, field: str, default: float | None = None) -> float:
        """Reads a number that must be above 0, such as a divisor or a scale."""
        value = self.number(field, default)
        if value <= 0:
            raise ValueError(f"{self.name}: {field} is {value!r}; it must be a positive number")
        return value

    def flag(self, field: str, default: bool) -> bool:
        return self._checked(field, default, lambda v: isinstance(v, bool), "true or false")

    def choice(self, field: str, choices: dict[str, Any], default: str | None = None) -> Any:
        """Reads a string that must be a key of `choices`, and returns the value under that key."""
        value = self._checked(
            field, default, lambda v: isinstance(v, str) and v in choices, " or ".join(choices)
        )
        return choices[value]

    def listed(
        self, field: str, kind: type, default: Sequence[Any] = (), count: int | None = None
    ) -> list[Any]:
        """Reads a list of elements of type `kind` (int or str), with `count` elements if given."""
        return self._checked(
            field,
            list(default),
            lambda v: (
                isinstance(v, list) and all(type(x) is kind for x in v) and count in (None, len(v))
            ),
            f"a list of {kind.__name__}" + (f", {count} of them" if count is not None else ""),
        )

    def layer_types(self, default: Sequence[str], known: Iterable[str]) -> list[str]:
        """Reads `layer_types`, which has a string from `known` for every layer.

        default: the list that an absent field stands for; a list of another length is refused.
        """
        types = self.listed("layer_types", str, default, len(default))
        if unknown := sorted(set(types) - set(known)):
            raise ValueError(
                f"{self.name}: layer_types has {unknown[0]!r}; supported are {', '.join(known)}"
            )
        return types

    def get(self, field: str, default: Any = None) -> Any:
        """Returns a field's value unchecked, or `default` if it is null or absent."""
        value = self.fields.get(field)
        return default if value is None else value

    def section(self, field: str) -> "HFConfig":
        """Reads a nested object as an HFConfig; an absent or null one has no fields."""
        value = self._checked(field, {}, lambda v: isinstance(v, dict), "an object")
        return HFConfig(value, f"{self.name}, {field}")

    def require(self, **fields) -> None:
        """Raises ValueError if a field has another value than given here; absent ones pass."""
        for field, value in fields.items():
            found = self.get(field, value)
            if found != value:
                raise ValueError(
                    f"{self.name}: {field} is {found!r}; only {value!r} is supported for this architecture"
                )

    def options(self, table: Iterable[Any]) -> dict[str, Any]:
        """Reads the fields of a table of `parts.Field`; returns {our option: value}."""
        return {f.ours: f.read(self, f.theirs, f.default) for f in table}

    def _checked(self, field, default, is_right, what):
        value = self.get(field, default)
        if value is None:
            raise ValueError(f"{self.name} lacks {field!r}, {what}")
        if not is_right(value):
            raise ValueError(f"{self.name}: {field} is {value!r}; it must be {what}")
        return value


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Description of one family of models; this module's docstring explains the functions it holds.

    model_type, class_name: as in config.json ("llama", "LlamaForCausalLM").
    ignored: regular expressions of the names of tensors that are skipped.
    base_prefix: the prefix of tensor names that files saved without a language-modelling head lack.
    """

    model_type: str
    class_name: str
    model_config: Callable[[HFConfig], dict[str, Any]]
    hf_config: Callable[[dict[str, Any], tuple[MixerSpec, ...]], dict[str, Any]]
    rules: Callable[[dict[str, Any], tuple[MixerSpec, ...]], Iterable[Rule]]
    ignored: tuple[str, ...] = _ROTARY_BUFFERS
    base_prefix: str = "model."


def names() -> list[str]:
    """Returns the supported values of config.json's `model_type`, sorted."""
    return sorted(_MODULES)


def check_supported(config: HFConfig) -> None:
    """Raises ValueError for fields that change what is computed and that no family reads."""
    config.require(**_UNSUPPORTED)


def get(model_type: object) -> Architecture:
    """Returns the family with config.json's `model_type`; raises ValueError for an unknown one."""
    if model_type not in _MODULES:
        raise ValueError(
            f"unknown architecture {model_type!r}; supported are {', '.join(names())}, and seqmodels for our own"
        )
    return importlib.import_module(f"{__name__}.{model_type}").ARCHITECTURE
