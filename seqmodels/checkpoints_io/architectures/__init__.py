"""Published architectures by the `model_type` of their config.json. A family is a file here and a
line in `_MODULES`.

To add one, write `<family>.py` with an `ARCHITECTURE`, four things that all say only what differs:

- `model_config(config)`: config.json to the dict that `language_model.from_config` takes, without
  dtypes. Read fields through `HFConfig` (`integer`, `number`, `flag`, `choice`), which refuses a
  hostile value by name; refuse with ValueError what we cannot compute. Per-layer differences go
  into the pattern: `pattern.to_text` writes one of a list of MixerSpec.
- `hf_config(model, specs)`: the inverse, as far as the family can express it. It need not check:
  the framework reads its result back with `model_config` and refuses to export where that is
  another model. `model` has every field, defaults too.
- `rules(model, specs)`: every tensor, as `rules.Rule`s; see `checkpoints_io.rules` for the usual
  ones (linear, conv1d, split), `moved` for any other exact move of one tensor and `Rule` for
  several. Layers are "block_{i}" for all i, scanned or not.
- `ignored`: regular expressions (full match) of tensors in files that carry nothing: buffers.

The framework streams tensors through the rules both ways, stacks scanned layers, finds missing,
extra and misshapen tensors, casts, shards. Nothing computed may be lost: test a family with
transformers' model as the oracle by `tests/seqmodels/checkpoints_io/oracle_suite.py` (logits to
1e-4, the file byte-equal after a round trip).
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterable
from typing import Any

from seqmodels.checkpoints_io.rules import Rule
from seqmodels.modules.pattern import MixerSpec

# model_type: module. Several model types may share one.
_MODULES = {
    "bamba": "bamba",
    "delta_net": "delta_net",
    "gated_deltanet": "gated_deltanet",
    "gla": "gla",
    "gpt2": "gpt2",
    "hgrn2": "hgrn2",
    "llama": "llama",
    "mamba": "mamba",
    "mamba2": "mamba2",
    "minimax": "minimax",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_next": "qwen3_next",
    "recurrent_gemma": "recurrent_gemma",
    "retnet": "retnet",
    "smollm3": "smollm3",
    "xlstm": "xlstm",
}


_MOST_LAYERS, _LARGEST = 10_000, 2**31
# What other families compute with and none of these: a config.json that has one, with another
# value, is of no model here.
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
    """A config.json whose fields are read with a check of what they are. `name` is the file, for
    messages."""

    def __init__(self, fields: dict[str, Any], name: str):
        self.fields, self.name = fields, name

    def with_defaults(self, **fields) -> "HFConfig":
        """The same where fields that are absent (null is not) have these values, as their library
        gives them."""
        return HFConfig(fields | self.fields, self.name)

    def integer(self, field: str, default: int | None = None) -> int:
        """A positive integer, of a size that a model can have."""
        most = _MOST_LAYERS if "layer" in field or "block" in field else _LARGEST
        return self._checked(
            field,
            default,
            lambda v: type(v) is int and 0 < v <= most,
            f"a positive integer up to {most}",
        )

    def optional_integer(self, field: str) -> int | None:
        """A positive integer; None where it is null or absent."""
        return None if self.get(field) is None else self.integer(field)

    def number(self, field: str, default: float | None = None) -> float:
        value = self._checked(
            field, default, lambda v: type(v) in (int, float) and abs(v) < 1e30, "a number"
        )
        return float(value)

    def positive(self, field: str, default: float | None = None) -> float:
        """A number that is a divisor or a scale: neither 0 nor negative."""
        value = self.number(field, default)
        if value <= 0:
            raise ValueError(f"{self.name}: {field} is {value!r}; it must be a positive number")
        return value

    def flag(self, field: str, default: bool) -> bool:
        return self._checked(field, default, lambda v: isinstance(v, bool), "true or false")

    def choice(self, field: str, choices: dict[str, Any], default: str | None = None) -> Any:
        """choices[value of the field]."""
        value = self._checked(
            field, default, lambda v: isinstance(v, str) and v in choices, " or ".join(choices)
        )
        return choices[value]

    def strings(self, field: str, count: int, default: list[str] | None = None) -> list[str]:
        """A list of `count` strings: one a layer."""
        return self._checked(
            field,
            default,
            lambda v: isinstance(v, list) and len(v) == count and all(type(x) is str for x in v),
            f"a list of {count} names",
        )

    def integers(self, field: str, count: int, default: list[int] | None = None) -> list[int]:
        """A list of `count` integers."""
        return self._checked(
            field,
            default,
            lambda v: isinstance(v, list) and len(v) == count and all(type(x) is int for x in v),
            f"a list of {count} integers",
        )

    def get(self, field: str, default: Any = None) -> Any:
        """The field as it is; null is the default."""
        value = self.fields.get(field)
        return default if value is None else value

    def section(self, field: str) -> "HFConfig":
        """A nested object; absent or null is an empty one."""
        value = self._checked(field, {}, lambda v: isinstance(v, dict), "an object")
        return HFConfig(value, f"{self.name}, {field}")

    def require(self, field: str, value: Any) -> None:
        """Refuses any other value of a field that may also be absent."""
        found = self.get(field, value)
        if found != value:
            raise ValueError(
                f"{self.name}: {field} is {found!r}; only {value!r} is supported for this architecture"
            )

    def _checked(self, field, default, is_right, what):
        value = self.get(field, default)
        if value is None:
            raise ValueError(f"{self.name} lacks {field!r}, {what}")
        if not is_right(value):
            raise ValueError(f"{self.name}: {field} is {value!r}; it must be {what}")
        return value


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a family says of itself; see this module's docstring.

    model_type, class_name: as in config.json ("llama", "LlamaForCausalLM").
    base_prefix: of the names that files saved without the language-modelling head leave out.
    """

    model_type: str
    class_name: str
    model_config: Callable[[HFConfig], dict[str, Any]]
    hf_config: Callable[[dict[str, Any], tuple[MixerSpec, ...]], dict[str, Any]]
    rules: Callable[[dict[str, Any], tuple[MixerSpec, ...]], Iterable[Rule]]
    ignored: tuple[str, ...] = ()
    base_prefix: str = "model."


def names() -> list[str]:
    """Every supported model_type."""
    return sorted(_MODULES)


def check_supported(config: HFConfig) -> None:
    """Refuses, by name and value, fields that change what is computed and that no architecture here
    reads."""
    for field, neutral in _UNSUPPORTED.items():
        config.require(field, neutral)


def get(model_type: object) -> Architecture:
    """The architecture of a config.json's model_type. Raises ValueError, listing the supported
    ones."""
    if not isinstance(model_type, str) or model_type not in _MODULES:
        raise ValueError(
            f"unknown architecture {model_type!r}; supported are {', '.join(names())}, and seqmodels for our own"
        )
    module = importlib.import_module(f"{__name__}.{_MODULES[model_type]}")
    return module.ARCHITECTURE
