"""Models from and to folders and files: `load_pretrained` and `save_pretrained`."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from seqmodels import language_model, mixers
from seqmodels.checkpoints_io import architectures, conversion, files, own_layout, special_tokens
from seqmodels.checkpoints_io.architectures import Architecture, HFConfig
from seqmodels.checkpoints_io.special_tokens import TOKENIZER_FILE, SpecialTokens
from seqmodels.modules import pattern

GGUF_PREFIX = "gguf:"
# They say how a model is computed, not which one it is.
_HOW = ("dtype", "param_dtype", "float32_residual", "remat", "scan_layers", "parent", "name")
_HOW_OF_MIXERS = ("dtype", "param_dtype", "implementation", "chunk_size", "max_length")


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model as it was found.

    model_config: what `language_model.from_config` takes. params: JAX arrays (or what `put` made of
      them).
    hf_config: config.json as it was. tokenizer_path: a `tokenizers` file, if there is one. tokens:
      what the files say of tokens.
    dtypes: in which the parameters lay in the files, by path ("block_3/mixer/q/kernel", scanned or
      not): given to `save_pretrained`, a file comes out as it went in.
    """

    model_config: dict[str, Any]
    params: dict[str, Any]
    hf_config: dict[str, Any]
    source: str
    tokenizer_path: Path | None = None
    tokens: SpecialTokens = SpecialTokens()
    dtypes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def model(self) -> language_model.LanguageModel:
        return language_model.from_config(self.model_config)

    @property
    def chat_template(self) -> str | None:
        """What a conversation is written with: Jinja, if there is a template."""
        return self.tokens.chat_templates.get(special_tokens.DEFAULT)


def load_pretrained(
    source: str | Path,
    *,
    dtype: str | None = None,
    max_len: int | None = None,
    put: Callable[[str, np.ndarray], Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Pretrained:
    """The model in a folder (config.json + safetensors), `gguf:<file>` (`gguf:smollm2`: of the
    extra [smollm]), or by a hub name.

    dtype: of parameters and activations (gates, decays, states and norms' sums stay float32); None
      is the files' own. Where it is float16, activations are float32: they hold every number of the
      files, and grow beyond float16's 65504 in many models.
    max_len: tokens that full-attention layers keep when decoding; None is the model's context.
    put: (path, array) -> what to keep of a parameter, for instance device_put to a sharding; None
      is jnp.asarray.
    overrides: fields of config.model to change, such as remat, scan_layers, or param_dtype by
      itself.

    Tensors are read one at a time, so that the memory is that of what `put` keeps, and of the
    largest parameter.

    Raises:
      ValueError: an architecture that is not supported (those that are, are listed); files that are
        cut off or are not what they say; tensors that are missing, extra or misshapen, by name;
        max_len beyond the model's context.
    """
    hf_config, tensors, tokenizer_path, tokens = _open(str(source))
    if hf_config.get("model_type") == own_layout.MODEL_TYPE:
        architecture = own_layout.ARCHITECTURE
    else:
        architecture = architectures.get(hf_config.fields.get("model_type"))
        architectures.check_supported(hf_config)
    param_dtype = dtype or _main_dtype(tensors)
    computed = "float32" if param_dtype == "float16" else param_dtype
    how = {"dtype": computed, "param_dtype": param_dtype} | dict(overrides or {})
    try:
        model_config = architecture.model_config(hf_config) | how
        model_config = with_max_len(model_config, max_len, hf_config.name)
        slots, rules = _table(architecture, model_config)
    except (TypeError, OverflowError, ArithmeticError, LookupError, AttributeError) as error:
        raise ValueError(
            f"{hf_config.name} describes no model that can be built: {error}"
        ) from error
    stored_numbers = sum(math.prod(entry.shape) for entry in tensors.entries.values())
    if conversion.num_parameters(slots) > 100 * (stored_numbers + 10_000):
        raise ValueError(
            f"{hf_config.name} describes {conversion.num_parameters(slots):,} parameters, "
            f"and {tensors.name} holds {stored_numbers:,}"
        )
    expected = conversion.expected_entries(rules, slots)
    tensors = _with_prefix(tensors, expected, architecture.base_prefix)
    if conversion.is_untied(tensors, rules, expected):
        model_config["tied_embeddings"] = False
        slots, rules = _table(architecture, model_config)
        expected = conversion.expected_entries(rules, slots)
    conversion.check_source(tensors, expected, architecture.ignored)

    def dtype_of(leaf, found):
        own = slots.leaves[leaf].dtype
        return own if dtype else np.dtype(jnp.result_type(own, *found))

    put = put or (lambda _, array: jnp.asarray(array))
    params = conversion.read_params(tensors, rules, slots, dtype_of, put)
    dtypes = {
        path: jnp.result_type(*(tensors.entries[name].dtype for name in rule.names)).name
        for rule in rules
        for path in rule.paths
    }
    return Pretrained(
        model_config, params, hf_config.fields, str(source), tokenizer_path, tokens, dtypes
    )


def save_pretrained(
    folder: str | Path,
    model_config: Mapping[str, Any],
    params: Mapping[str, Any],
    *,
    architecture: str = own_layout.MODEL_TYPE,
    dtype: str | Mapping[str, str] | None = None,
    hf_config: Mapping[str, Any] | None = None,
    tokenizer_path: str | Path | None = None,
    tokens: SpecialTokens | None = None,
    max_shard_bytes: int = files.MAX_SHARD_BYTES,
) -> list[Path]:
    """Writes safetensors and config.json to `folder`; returns the files' paths.

    architecture: "seqmodels", our own layout, which holds any config.model, or a model_type of the
      registry, for other programs.
    dtype: of all tensors but those that every model keeps in float32, such as decays, which a
      recurrence raises to powers. Or of each parameter, by path (`Pretrained.dtypes`). None, and a
      path that is not there, is its own.
    hf_config: fields that config.json keeps where the model does not say otherwise, such as
      `bos_token_id`.
    tokenizer_path: a tokenizer.json to copy, with what describes it in its folder.
    tokens: written as `special_tokens.write` does; None is what the files beside the tokenizer and
      `hf_config` say.

    Raises:
      ValueError: a model that this architecture cannot express, with what differs; parameters of
        another model.
    """
    model_config = dict(model_config)
    model = language_model.from_config(model_config)
    target = own_layout.ARCHITECTURE
    if architecture != own_layout.MODEL_TYPE:
        target = architectures.get(architecture)
    filled = _with_defaults(model_config, model)
    kept = dict(hf_config or {})
    tokenizer_path = Path(tokenizer_path) if tokenizer_path else None
    if tokens is None:
        tokens = (
            special_tokens.read(tokenizer_path.parent, kept) if tokenizer_path else SpecialTokens()
        )
    kept |= {name: i for name, i in tokens.ids().items() if kept.get(name) is None}
    config = _hf_config(target, filled, model, kept)
    slots, rules = _table(target, model_config)
    entries, read = conversion.tensor_reader(dict(params), rules, slots, dtype)
    counts: dict[str, int] = {}
    for entry in entries.values():
        counts[entry.dtype.name] = counts.get(entry.dtype.name, 0) + entry.num_bytes
    config["dtype"] = max(counts, key=counts.get)
    folder = Path(folder)
    paths = files.write(folder, entries, read, max_shard_bytes)
    config_path = folder / "config.json"
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    paths += [config_path, *special_tokens.write(folder, tokens, tokenizer_path)]
    return paths


def same_model(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What differs between the models of two configs, "field: a, b" each; nothing where they
    compute the same."""
    a, b = (_what(language_model.from_config(dict(config))) for config in (a, b))
    return [f"{k}: {a.get(k)!r}, {b.get(k)!r}" for k in sorted(a | b) if a.get(k) != b.get(k)]


def _table(architecture: Architecture, model_config: Mapping[str, Any]):
    """Where the model's parameters lie, and the rules that make them."""
    model = language_model.from_config(dict(model_config))
    slots = conversion.Slots(model)
    filled = _with_defaults(model_config, model)
    return slots, conversion.check_rules(architecture.rules(filled, model.mixers), slots)


def _with_defaults(model_config: Mapping[str, Any], model) -> dict[str, Any]:
    """config.model with every field that a LanguageModel has."""
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
    return {k: v for k, v in fields.items() if k not in ("mixers", "parent", "name")} | dict(
        model_config
    )


def _what(model) -> dict[str, Any]:
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
    what = {k: v for k, v in fields.items() if k not in (*_HOW, "mixers")}
    for i, spec in enumerate(model.mixers):
        options = mixers.options(spec.name) | {"d_model": model.d_model} | dict(spec.options)
        if spec.name == "attention":
            options = _as_computed(options)
        options = {k: v for k, v in options.items() if k not in _HOW_OF_MIXERS}
        what |= {f"layer {i}, mixer": spec.name}
        what |= {f"layer {i}, {spec.name}, {k}": v for k, v in options.items()}
    return what


def _as_computed(options: dict[str, Any]) -> dict[str, Any]:
    """Attention's options with what None stands for, and without those that have no effect."""
    H, qk_norm = options["num_heads"], options["qk_norm"]
    filled = {
        "num_kv_heads": options["num_kv_heads"] or H,
        "head_dim": options["head_dim"] or options["d_model"] // H,
        "o_bias": options["use_bias"] if options["o_bias"] is None else options["o_bias"],
        "qk_norm": "rms_norm" if qk_norm is True else qk_norm,
        "norm_eps": options["norm_eps"] if qk_norm else None,
        "rope_scaling": options["rope_scaling"] if options["rope_base"] else None,
    }
    return options | filled


def _hf_config(target: Architecture, model_config, model, kept: dict) -> dict[str, Any]:
    config = target.hf_config(model_config, model.mixers)
    context = [
        c["max_position_embeddings"] for c in (kept, config) if "max_position_embeddings" in c
    ]
    if kept.get("model_type") != target.model_type:
        own = (
            "document_token",
        )  # read by `experiments` alone: what stands before a run's documents
        kept = {k: v for k, v in kept.items() if k.endswith("_token_id") or k in own}
    config = kept | config
    if context:  # the cache of a decoder may be shorter than the model's context
        config["max_position_embeddings"] = max(context)
    config |= {"model_type": target.model_type, "architectures": [target.class_name]}
    config = {k: v for k, v in config.items() if k != "torch_dtype"}
    back = target.model_config(HFConfig(config, f"config.json as {target.model_type}"))
    if differing := same_model(model_config, back):
        raise ValueError(
            f"the layout {target.model_type!r} has no place for this model; use architecture='seqmodels'. "
            f"What it would lose (this model, what would be read back): {'; '.join(differing[:5])}"
        )
    return config


def _open(source: str):
    """(config, tensors, tokenizer file or None, special tokens) of any source."""
    if source.startswith(GGUF_PREFIX):
        from seqmodels.checkpoints_io import gguf_files  # an extra

        return gguf_files.open_model(Path(source.removeprefix(GGUF_PREFIX)).expanduser())
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = _from_hub(source)
    config = HFConfig(files.read_json(folder / "config.json"), str(folder / "config.json"))
    tensors = files.open_folder(folder)
    tokenizer = folder / TOKENIZER_FILE
    tokenizer = special_tokens.completed(tokenizer) if tokenizer.is_file() else None
    tokens = special_tokens.read(tokenizer.parent if tokenizer else folder, config.fields)
    return config, tensors, tokenizer, tokens


def _from_hub(name: str) -> Path:
    """The local copy of a hub model, downloaded where the machine is online."""
    kinds = (
        "a folder with config.json and safetensors, gguf:<file>, or a hub name such as org/model"
    )
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith(".gguf"):
        raise ValueError(f"there is no folder {name!r}; give {kinds}")
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(
            f"there is no folder {name!r}, and a hub name needs huggingface_hub, which is not installed; give {kinds}"
        ) from error
    # Not "*.safetensors": some models are there twice, as their authors trained them, too.
    patterns = ["model*.safetensors", "*.json", "*.jinja"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except (
        Exception
    ) as error:  # no network, no such model, no permission: the library has a class for each
        reason = str(error).splitlines()[0]
        raise ValueError(f"there is no folder {name!r}, and the hub gave none: {reason}") from error


def with_max_len(model_config: Mapping[str, Any], max_len: int | None, name: str) -> dict[str, Any]:
    """config.model whose full-attention layers hold `max_len` tokens when decoding (None: as many
    as they do).

    Raises ValueError, naming the model by `name`, for more than they do now.
    """
    model_config = dict(model_config)
    if max_len is None:
        return model_config
    specs = language_model.from_config(model_config).mixers
    limited = []
    for spec in specs:
        options = mixers.options(spec.name) | dict(spec.options)
        context = options.get("max_length")
        if context is None or options.get("window") is not None:
            limited.append(spec)
            continue
        if not 0 < max_len <= context:
            raise ValueError(f"max_len is {max_len}; the context of {name} is {context} tokens")
        own = dict(spec.options) | {"max_length": max_len}
        limited.append(dataclasses.replace(spec, options=tuple(own.items())))
    return model_config | {"pattern": pattern.to_text(limited)}


def _main_dtype(tensors: files.Source) -> str:
    """The dtype of most bytes that are floating point."""
    counts: dict[str, int] = {}
    for entry in tensors.entries.values():
        if jnp.issubdtype(entry.dtype, jnp.floating):
            counts[entry.dtype.name] = counts.get(entry.dtype.name, 0) + entry.num_bytes
    if not counts:
        raise ValueError(f"{tensors.name} holds no tensor of a floating dtype")
    main = max(counts, key=counts.get)
    return "float32" if main == "float64" else main


class _Renamed:
    """A source in which names that the table knows lack a prefix."""

    def __init__(self, source: files.Source, prefix: str, expected: Mapping[str, files.Entry]):
        self.name, self._source = source.name, source
        self._theirs = {
            prefix + name if prefix + name in expected else name: name for name in source.entries
        }
        self.entries = {ours: source.entries[theirs] for ours, theirs in self._theirs.items()}

    def read(self, name: str) -> np.ndarray:
        return self._source.read(self._theirs[name])


def _with_prefix(tensors: files.Source, expected: Mapping[str, files.Entry], prefix: str):
    if not prefix or any(name.startswith(prefix) for name in tensors.entries):
        return tensors
    return _Renamed(tensors, prefix, expected)
