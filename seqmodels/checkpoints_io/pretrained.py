"""Loads pretrained models from folders, GGUF files and the hub, and saves them to folders."""

import collections
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from seqmodels import language_model, mixers, models
from seqmodels.checkpoints_io import architectures, conversion, files, own_layout, special_tokens
from seqmodels.checkpoints_io.architectures import Architecture, HFConfig
from seqmodels.checkpoints_io.special_tokens import TOKENIZER_FILE, SpecialTokens
from seqmodels.modules import pattern

GGUF_PREFIX = "gguf:"
# Fields that say how a model is computed, not which model it is.
_HOW = ("dtype", "param_dtype", "float32_residual", "remat", "scan_layers", "parent", "name")
_HOW_OF_MIXERS = ("dtype", "param_dtype", "implementation", "chunk_size", "max_length")


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Result of `load_pretrained`.

    model_config: what `models.from_config` takes.
    params: JAX arrays, or what `put` made of them.
    hf_config: the fields of config.json, unchanged.
    tokenizer_path: a file of the `tokenizers` library, if there is one.
    tokens: special tokens and chat templates.
    dtypes: {path: dtype in the files} of the parameters; a path is "block_3/mixer/q/kernel",
      scanned or not. With these as its `dtype`, `save_pretrained` writes files equal to those that
      were read.
    """

    model_config: dict[str, Any]
    params: dict[str, Any]
    hf_config: dict[str, Any]
    source: str
    tokenizer_path: Path | None = None
    tokens: SpecialTokens = SpecialTokens()
    dtypes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def model(self) -> Any:
        return models.from_config(self.model_config)

    @property
    def chat_template(self) -> str | None:
        """Returns the Jinja template that formats conversations, or None."""
        return self.tokens.chat_templates.get(special_tokens.DEFAULT)


def load_pretrained(
    source: str | Path,
    *,
    dtype: str | None = None,
    max_len: int | None = None,
    put: Callable[[str, np.ndarray], Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Pretrained:
    """Loads the model in a folder (config.json and safetensors), a GGUF file, or on the hub.

    Tensors are read one at a time: memory holds what `put` returns and the largest parameter.

    Args:
      source: a folder, `gguf:<file>` (`gguf:smollm2` is that of the extra [smollm]), or a hub name.
      dtype: of parameters and activations (gates, decays, states and norms' sums stay float32).
        None keeps the files' dtype; if that is float16, activations are float32, as many models'
        activations exceed float16's 65504.
      max_len: tokens that full-attention layers keep when decoding; None is the model's context.
      put: a function of (path, array) that returns what to keep of a parameter, for instance
        device_put to a sharding; None is jnp.asarray.
      overrides: fields of config.model to change, such as remat or scan_layers.

    Raises:
      ValueError: an architecture that is not supported (the message lists those that are); files
        that are cut off or of another format; tensors that are missing, extra or misshapen, by
        name; max_len beyond the model's context.
    """
    hf_config, tensors, tokenizer_path, tokens = _open(str(source))
    if hf_config.get("model_type") == own_layout.MODEL_TYPE:
        architecture = own_layout.ARCHITECTURE
    else:
        architecture = architectures.get(hf_config.fields.get("model_type"))
        architectures.check_supported(hf_config)
    param_dtype = dtype or _weights_dtype(tensors)
    computed = "float32" if param_dtype == "float16" else param_dtype
    how = {"dtype": computed, "param_dtype": param_dtype} | dict(overrides or {})
    # Files saved without a language-modelling head lack the prefix of the architecture's names.
    prefix = architecture.base_prefix
    prefix = "" if any(name.startswith(prefix) for name in tensors.entries) else prefix
    try:
        model_config = architecture.model_config(hf_config) | how
        model_config = with_max_len(model_config, max_len, hf_config.name)
        slots, rules = _table(architecture, model_config, prefix)
    except (TypeError, OverflowError, ArithmeticError, LookupError, AttributeError) as error:
        raise ValueError(
            f"{hf_config.name} describes no model that can be built: {error}"
        ) from error
    # A hostile config.json may describe a model that fills the memory.
    stored_numbers = sum(math.prod(entry.shape) for entry in tensors.entries.values())
    if conversion.num_parameters(slots) > 100 * (stored_numbers + 10_000):
        raise ValueError(
            f"{hf_config.name} describes {conversion.num_parameters(slots):,} parameters, "
            f"and {tensors.name} holds {stored_numbers:,}"
        )
    expected = conversion.expected_entries(rules, slots)
    if conversion.is_untied(tensors, rules, expected):
        model_config["tied_embeddings"] = False
        slots, rules = _table(architecture, model_config, prefix)
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
    """Writes safetensors, config.json and a tokenizer's files to `folder`; returns their paths.

    Args:
      architecture: "seqmodels" is our own layout, which holds any config.model; a model_type of
        `architectures` makes files for other programs.
      dtype: of all tensors but those that every model keeps in float32, such as decays, which a
        recurrence raises to powers. Or {path: dtype} of single parameters (`Pretrained.dtypes`).
        None, and a path that this lacks, keep the parameter's own dtype.
      hf_config: fields to add to config.json if the model does not determine them, such as
        `bos_token_id`.
      tokenizer_path: a tokenizer.json to copy, with the files that describe it in its folder.
      tokens: special tokens to write; None takes those of `hf_config` and the tokenizer's files.

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
    if tokens is None and tokenizer_path:
        tokens = special_tokens.read(tokenizer_path.parent, kept)
    tokens = tokens or SpecialTokens()
    kept |= {name: i for name, i in tokens.ids().items() if kept.get(name) is None}
    config = _hf_config(target, filled, model, kept)
    slots, rules = _table(target, model_config)
    entries, read = conversion.tensor_reader(dict(params), rules, slots, dtype)
    config["dtype"] = _main_dtype(entries.values())
    folder = Path(folder)
    paths = files.write(folder, entries, read, max_shard_bytes)
    config_path = folder / "config.json"
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    paths += [config_path, *special_tokens.write(folder, tokens, tokenizer_path)]
    return paths


def same_model(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Lists how the models of two configs differ, as "field: a, b"; [] if they compute the same."""
    a, b = (_computation(language_model.from_config(dict(config))) for config in (a, b))
    return [f"{k}: {a.get(k)!r}, {b.get(k)!r}" for k in sorted(a | b) if a.get(k) != b.get(k)]


def _table(architecture: Architecture, model_config: Mapping[str, Any], prefix: str = ""):
    """Returns a model's Slots, and the rules between its parameters and a checkpoint's tensors.

    prefix: what the checkpoint's tensor names lack, compared with the architecture's.
    """
    model = language_model.from_config(dict(model_config))
    slots = conversion.Slots(model)
    rules = architecture.rules(_with_defaults(model_config, model), model.mixers)
    return slots, conversion.check_rules((rule.without(prefix) for rule in rules), slots)


def _with_defaults(model_config: Mapping[str, Any], model) -> dict[str, Any]:
    """Returns config.model with all fields of LanguageModel; absent ones have their defaults."""
    fields = _fields(model)
    for name in ("mixers", "parent", "name"):
        del fields[name]
    return fields | dict(model_config)


def _fields(model) -> dict[str, Any]:
    return {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}


def _computation(model) -> dict[str, Any]:
    """Returns, as a flat dict, the fields and options that determine what a model computes."""
    what = {k: v for k, v in _fields(model).items() if k not in (*_HOW, "mixers")}
    for i, spec in enumerate(model.mixers):
        options = mixers.options(spec.name) | {"d_model": model.d_model} | dict(spec.options)
        if spec.name == "attention":
            options = _as_computed(options)
        options = {k: v for k, v in options.items() if k not in _HOW_OF_MIXERS}
        what |= {f"layer {i}, mixer": spec.name}
        what |= {f"layer {i}, {spec.name}, {k}": v for k, v in options.items()}
    return what


def _as_computed(options: dict[str, Any]) -> dict[str, Any]:
    """Returns attention's options with each None replaced by its meaning, and unused ones None."""
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
    """Returns a model's config.json in the layout `target`; raises ValueError if that loses
    something."""
    config = target.hf_config(model_config, model.mixers)
    length = "max_position_embeddings"
    context = [c[length] for c in (kept, config) if length in c]
    if kept.get("model_type") != target.model_type:
        # document_token, which `experiments` reads, is what stands before a run's documents.
        kept = {k: v for k, v in kept.items() if k.endswith("_token_id") or k == "document_token"}
    config = kept | config
    if context:  # a decoder's cache may be shorter than the model's context
        config[length] = max(context)
    config |= {"model_type": target.model_type, "architectures": [target.class_name]}
    config = {k: v for k, v in config.items() if k != "torch_dtype"}
    # Read the result back: an export that loses something is refused.
    back = target.model_config(HFConfig(config, f"config.json as {target.model_type}"))
    if differing := same_model(model_config, back):
        raise ValueError(
            f"the layout {target.model_type!r} has no place for this model; use architecture='seqmodels'. "
            f"What it would lose (this model, what would be read back): {'; '.join(differing[:5])}"
        )
    return config


def _open(source: str):
    """Opens a folder, GGUF file or hub model: (config, tensors, tokenizer file or None, tokens)."""
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
    """Returns the local folder of a model on the hub, downloaded if need be."""
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
    # Not "*.safetensors": some models also have their authors' original files.
    patterns = ["model*.safetensors", "*.json", "*.jinja"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    # No network, no such model, no permission: the library has a class for each.
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"there is no folder {name!r}, and the hub gave none: {reason}") from error


def with_max_len(model_config: Mapping[str, Any], max_len: int | None, name: str) -> dict[str, Any]:
    """Returns `model_config` with decoding caches of `max_len` tokens in full-attention layers.

    None changes nothing. Raises ValueError, naming the model by `name`, for more than its context.
    """
    if max_len is None:
        return dict(model_config)
    specs = list(language_model.from_config(dict(model_config)).mixers)
    for i, spec in enumerate(specs):
        options = mixers.options(spec.name) | dict(spec.options)
        context = options.get("max_length")
        if context is None or options.get("window") is not None:
            continue
        if not 0 < max_len <= context:
            raise ValueError(f"max_len is {max_len}; the context of {name} is {context} tokens")
        own = dict(spec.options) | {"max_length": max_len}
        specs[i] = dataclasses.replace(spec, options=tuple(own.items()))
    return dict(model_config) | {"pattern": pattern.to_text(specs)}


def _weights_dtype(tensors: files.Source) -> str:
    """Returns the floating dtype of most bytes of the tensors; float32 in place of float64."""
    entries = [e for e in tensors.entries.values() if jnp.issubdtype(e.dtype, jnp.floating)]
    if not entries:
        raise ValueError(f"{tensors.name} holds no tensor of a floating dtype")
    main = _main_dtype(entries)
    return "float32" if main == "float64" else main


def _main_dtype(entries: Iterable[files.TensorEntry]) -> str:
    counts: collections.Counter[str] = collections.Counter()
    for entry in entries:
        counts[entry.dtype.name] += entry.num_bytes
    return max(counts, key=lambda dtype: counts[dtype])
