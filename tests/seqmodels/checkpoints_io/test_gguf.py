"""GGUF files written by the gguf package, small; hostile ones made of them."""

import json
import struct

import gguf
import numpy as np
import pytest
import tokenizers

from seqmodels import checkpoints_io
from seqmodels.checkpoints_io import files, gguf_files, gguf_header, gguf_tokenizer
from seqmodels.checkpoints_io.architectures import decoder
from seqmodels.modules import positions

D, F, H, G, L, W = 64, 96, 4, 2, 2, 300
K = D // H
SIZES = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
TYPES = gguf.GGMLQuantizationType


def vocabulary():
    """Every byte, some merges, and two control tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = ["Ġ t", "h e", "Ġt he", "i n", "1 2", "l l"]
    tokens = ["<|endoftext|>", "<|im_start|>", *alphabet, *(m.replace(" ", "") for m in merges)]
    unused = [f"[unused{i}]" for i in range(W - len(tokens))]
    types = [3, 3] + [1] * (len(tokens) - 2) + [5] * len(unused)
    return tokens + unused, types, merges


def permuted(weight, heads):
    """As llama.cpp's converter writes q and k: the two halves of a head's channels, alternating."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def tensors(seed=0):
    """Under Hugging Face's names."""
    random = np.random.default_rng(seed)

    def matrix(*shape):
        return (random.normal(size=shape) * shape[-1] ** -0.5).astype(np.float32)

    arrays = {"model.embed_tokens.weight": matrix(W, D), "model.norm.weight": 1 + matrix(D)}
    for i in range(L):
        name = f"model.layers.{i}"
        arrays |= {
            f"{name}.input_layernorm.weight": 1 + matrix(D),
            f"{name}.post_attention_layernorm.weight": 1 + matrix(D),
            f"{name}.self_attn.q_proj.weight": matrix(H * K, D),
            f"{name}.self_attn.k_proj.weight": matrix(G * K, D),
            f"{name}.self_attn.v_proj.weight": matrix(G * K, D),
            f"{name}.self_attn.o_proj.weight": matrix(D, H * K),
            f"{name}.mlp.gate_proj.weight": matrix(F, D),
            f"{name}.mlp.up_proj.weight": matrix(F, D),
            f"{name}.mlp.down_proj.weight": matrix(D, F),
        }
    return arrays


def write(path, arrays, kind=TYPES.F32, rope_freqs=None):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(32)
    writer.add_embedding_length(D)
    writer.add_block_count(L)
    writer.add_feed_forward_length(F)
    writer.add_head_count(H)
    writer.add_head_count_kv(G)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(K)
    writer.add_rope_freq_base(10_000.0)
    tokens, types, merges = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages }}")
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, L)
    for name, array in arrays.items():
        if "q_proj" in name or "k_proj" in name:
            array = permuted(array, H if "q_proj" in name else G)
        theirs = names.get_name(name, try_suffixes=(".weight",))
        if array.ndim == 1 or kind == TYPES.F32:
            writer.add_tensor(theirs, array)
        elif kind == TYPES.F16:
            writer.add_tensor(theirs, array.astype(np.float16))
        else:
            writer.add_tensor(theirs, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tensors())


def test_float32_is_what_went_in(whole):
    loaded = checkpoints_io.load_pretrained(f"gguf:{whole}")
    config = loaded.model_config
    assert config["norm_eps"] == 1e-5 and config["tied_embeddings"] and config["vocab_size"] == W
    assert loaded.hf_config["bos_token_id"] == 1
    q_LDE = loaded.params["blocks"]["block_0"]["mixer"]["q"]["kernel"]
    weight = tensors()["model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(q_LDE[1], weight.T)
    assert loaded.model.mixers[0].name == "attention"


def test_llama_3s_scaling_is_read_off_its_frequencies(tmp_path):
    frequency_K = 10_000.0 ** (-np.arange(K // 2, dtype=np.float32) / (K // 2))
    scaled_11K, _ = positions.frequencies(K, 1e4, ("llama3", 8.0, 1.0, 4.0, 8192))
    divisor_K = frequency_K / np.asarray(scaled_11K[0, 0])
    assert divisor_K[0] == 1.0 and divisor_K[-1] == 8.0
    path = write(tmp_path / "scaled.gguf", tensors(), rope_freqs=divisor_K)
    config, _, _, _ = gguf_files.open_model(path)
    assert config.fields["rope_scaling"]["factor"] == 8.0
    path = write(tmp_path / "other.gguf", tensors(), rope_freqs=divisor_K + 0.5)
    with pytest.raises(ValueError, match="is not Llama 3's scaling"):
        gguf_files.open_model(path)


@pytest.mark.parametrize(
    "kind, error", [("F16", 1e-3), ("Q8_0", 0.02), ("Q4_0", 0.25), ("Q4_1", 0.2), ("Q5_1", 0.1)]
)
def test_quantized_tensors_are_near_what_went_in(kind, error, tmp_path):
    path = write(tmp_path / "q.gguf", tensors(), TYPES[kind])
    _, source, _, _ = gguf_files.open_model(path)
    for name, array in tensors().items():
        found = source.read(name)
        assert found.shape == array.shape and found.dtype == source.entries[name].dtype
        assert found.dtype == (np.float16 if kind == "F16" and array.ndim > 1 else np.float32)
        assert np.abs(found - array).max() < error * array.std() * 3 or array.ndim == 1


TEXTS = [
    "the thing in 1212 hills",
    "  two  spaces,\n\ttabs\r\n\r\nand 2024's numbers: 3.14159",
    "na\u00efve caf\u00e9 \u4f60\u597d \U0001f642 zero\u200bwidth",
    "<|im_start|>user\nhi<|endoftext|>",
    "",
]


def test_what_is_written_of_one_is_a_whole_folder(whole, tmp_path):
    loaded = checkpoints_io.load_pretrained(f"gguf:{whole}")
    checkpoints_io.save_pretrained(
        tmp_path,
        loaded.model_config,
        loaded.params,
        architecture="llama",
        hf_config=loaded.hf_config,
        tokenizer_path=loaded.tokenizer_path,
        tokens=loaded.tokens,
    )
    again = checkpoints_io.load_pretrained(tmp_path)
    assert again.tokens == loaded.tokens and again.chat_template == "{{ messages }}"
    assert not checkpoints_io.same_model(again.model_config, loaded.model_config)
    described = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (described["bos_token"], described["eos_token"]) == ("<|im_start|>", "<|endoftext|>")
    source = files.open_folder(tmp_path)
    for name, array in tensors().items():
        np.testing.assert_array_equal(source.read(name), array)


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2", "tekken", "starcoder"])
def test_the_tokenizer_splits_and_joins(pre, whole):
    metadata = gguf_header.read(whole, SIZES).metadata | {"tokenizer.ggml.pre": pre}
    metadata["tokenizer.ggml.add_bos_token"] = False
    tokenizer = gguf_tokenizer.make(metadata, "tiny.gguf")
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    digits = tokenizer.encode("1212").tokens
    assert digits == (
        ["1", "2", "1", "2"]
        if pre in ("smollm", "qwen2", "tekken", "starcoder")
        else ["12", "12"]
        if pre == "gpt-2"
        else ["12", "1", "2"]
    )
    assert tokenizer.encode("<|im_start|>the").ids[0] == 1
    start = metadata | {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 1}
    assert gguf_tokenizer.make(start, "tiny.gguf").encode("the").ids[0] == 1


def test_tekken_begins_words_at_capitals(whole):
    metadata = gguf_header.read(whole, SIZES).metadata | {"tokenizer.ggml.pre": "tekken"}
    cut = gguf_tokenizer.make(metadata, "tiny.gguf").pre_tokenizer.pre_tokenize_str
    words = [word for word, _ in cut("oneTwo THREEfour's 12")]
    assert words == ["one", "Two", "\u0120THREEfour", "'s", "\u0120", "1", "2"]


def test_llama_3_takes_words_whole_and_begins_with_bos(whole):
    """As its own tokenizer does (ignore_merges), and as llama.cpp does where the file has no
    add_bos_token."""
    metadata = gguf_header.read(whole, SIZES).metadata
    tokens = [t if t != "[unused0]" else "cat" for t in metadata["tokenizer.ggml.tokens"]]
    metadata["tokenizer.ggml.tokens"] = tokens  # no merge makes it
    for pre, expected in (("llama-bpe", ["<|im_start|>", "cat"]), ("qwen2", ["c", "a", "t"])):
        changed = metadata | {"tokenizer.ggml.pre": pre}
        assert gguf_tokenizer.make(changed, "tiny.gguf").encode("cat").tokens == expected


def test_weights_are_of_use_without_the_tokenizer(whole):
    metadata = gguf_header.read(whole, SIZES).metadata
    for pre in ("viking", "default", None):  # the last two say nothing of how words are cut
        with pytest.warns(UserWarning, match=f"{pre!r} is not supported; .*; give another token"):
            other = metadata | {"tokenizer.ggml.pre": pre}
            assert gguf_tokenizer.tokenizer_file(other, "tiny.gguf") is None
    none = metadata | {"tokenizer.ggml.model": "none"}
    assert gguf_tokenizer.tokenizer_file(none, "tiny.gguf") is None
    del metadata["tokenizer.ggml.model"]
    assert gguf_tokenizer.tokenizer_file(metadata, "tiny.gguf") is None


def string(text):
    return struct.pack("<Q", len(text)) + text


def hostile(whole):
    data = whole.read_bytes()
    huge = struct.pack("<Q", 2**60)
    key = string(b"llama.block_count") + struct.pack("<I", 4)
    merges = string(b"tokenizer.ggml.merges") + struct.pack("<II", 9, 8)
    norm = string(b"output_norm.weight") + struct.pack("<IQI", 1, D, 0)
    at = data.index(norm) + len(norm)
    return {
        "does not begin with GGUF": b"GGML" + data[4:],
        "is GGUF version 16777216": b"GGUF" + struct.pack(">I", 1) + data[8:],
        "is big-endian; versions 2 and 3, little": b"GGUF" + struct.pack(">I", 3) + data[8:],
        "announces 1152921504606846976 tensors": data[:8] + huge + data[16:],
        "announces 1152921504606846976 metadata entries": data[:16] + huge + data[24:],
        "a metadata key should take 1152921504606846976 bytes": data[:24] + huge + data[32:],
        "has the unknown type 99": data.replace(key, key[:-4] + struct.pack("<I", 99)),
        "announces 1152921504606846976 elements of": data.replace(merges + struct.pack("<Q", 6), merges + huge),
        "'output_norm.weight' has 9 axes": data.replace(norm, norm[:-16] + struct.pack("<IQI", 9, D, 0)),
        "'output_norm.weight' has the unknown type 77": data.replace(norm, norm[:-4] + struct.pack("<I", 77)),
        "no multiple of 32": data[:at] + struct.pack("<Q", 33) + data[at + 8 :],
        "is cut off: tensor": data[:at] + struct.pack("<Q", 2**50) + data[at + 8 :],
        "overlaps the one before": data[:at] + struct.pack("<Q", 0) + data[at + 8 :],
    }  # fmt: skip


def test_hostile_files(whole, tmp_path):
    path = tmp_path / "bad.gguf"
    for message, data in hostile(whole).items():
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message) as error:
            checkpoints_io.load_pretrained(f"gguf:{path}")
        assert str(path) in str(error.value)


def test_a_turn_may_end_as_no_text_does(whole):
    header = gguf_header.read(whole, SIZES)
    source = gguf_files.GGUFTensors(whole, header, gguf)
    for eot, expected in ((1, [0, 1]), (0, 0)):
        metadata = header.metadata | {"tokenizer.ggml.eot_token_id": eot}
        config = gguf_files._config(gguf_header.Header(metadata, header.tensors), source, "")
        assert config.fields["eos_token_id"] == expected


def test_two_names_of_one_tensor(whole):
    header = gguf_header.read(whole, SIZES)
    info = header.tensors["blk.0.attn_norm.weight"]
    twice = gguf_header.Header(header.metadata, header.tensors | {"blk.00.attn_norm.weight": info})
    with pytest.raises(ValueError, match="'blk.00.attn_norm.weight' is another name of a tensor"):
        gguf_files.GGUFTensors(whole, twice, gguf)


def test_any_cut_and_any_flipped_byte_of_the_header_is_noticed_or_harmless(whole, tmp_path):
    path = tmp_path / "bad.gguf"
    data = whole.read_bytes()
    header_end = min(i.begin for i in gguf_header.read(whole, SIZES).tensors.values())
    random = np.random.default_rng(0)
    for cut in random.integers(0, len(data), 60):
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError, match="bad.gguf"):
            gguf_header.read(path, SIZES)
    opened = 0
    for _ in range(200):
        changed = bytearray(data)
        for place in random.integers(0, header_end, random.integers(1, 4)):
            changed[place] = random.integers(0, 256)
        path.write_bytes(changed)
        try:
            _, source, _, _ = gguf_files.open_model(path)
        except ValueError as error:
            assert "bad.gguf" in str(error)
            continue
        opened += 1
        assert all(source.read(name).shape == e.shape for name, e in source.entries.items())
    assert 0 < opened < 200


def test_yarn(whole):
    header = gguf_header.read(whole, SIZES)
    scaling = {"type": "yarn", "factor": 4.0, "original_context_length": 16}
    changed = {f"llama.rope.scaling.{key}": value for key, value in scaling.items()}
    header = gguf_header.Header(header.metadata | changed, header.tensors)
    config = gguf_files._config(header, gguf_files.GGUFTensors(whole, header, gguf), "tiny.gguf")
    options = decoder.rope_options(config)
    amplitude = 0.1 * np.log(4.0) + 1.0
    assert options["rope_scaling"] == ("yarn", 4.0, 16, pytest.approx(amplitude), 32.0, 1.0, True)
    assert options["max_length"] == 64


WEIRD = [
    -1,
    0,
    3,
    1.5,
    float("nan"),
    "x",
    True,
    [],
    ["x"],
    [[1]],
    np.arange(3),
    np.ones(2, np.float32),
]


def test_metadata_with_anything_in_it_is_used_or_refused(whole):
    header = gguf_header.read(whole, SIZES)
    source = gguf_files.GGUFTensors(whole, header, gguf)
    refused = 0
    for key in header.metadata:
        for value in WEIRD:
            changed = gguf_header.Header(header.metadata | {key: value}, header.tensors)
            try:
                gguf_files._config(changed, source, "tiny.gguf")
                gguf_tokenizer.make(changed.metadata, "tiny.gguf")
            except ValueError as error:
                assert "tiny.gguf" in str(error)
                refused += 1
    assert refused > 5 * len(header.metadata)


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"general__architecture": "falcon"}, "unknown architecture 'falcon'; supported in GGUF"),
        ({"llama__expert_count": 8}, "llama.expert_count is 8"),
        ({"llama__logit_scale": 0.5}, "llama.logit_scale is 0.5; only 1.0"),
        ({"llama__attention__scale": 0.25}, "llama.attention.scale is 0.25"),
        ({"llama__rope__scaling__type": "longrope"}, "rope scaling by 'longrope'"),
        ({"llama__rope__dimension_count": 8}, "rope.dimension_count is 8"),
        (
            {"tokenizer__ggml__model": "bert"},
            "a tokenizer of kind 'bert' is not supported; gpt2, llama",
        ),
        (
            {"tokenizer__ggml__model": "llama"},
            "tokenizer.ggml.scores must be a list of 300 numbers",
        ),
        ({"tokenizer__ggml__pre": "viking"}, "pre-tokenizer 'viking' is not supported; .*smollm"),
        ({"llama__attention__head_count": 7}, "does not fit 7 heads"),
    ],
)
def test_files_that_are_whole_and_cannot_be_used(metadata, message, whole):
    header = gguf_header.read(whole, SIZES)
    changed = {key.replace("__", "."): value for key, value in metadata.items()}
    header = gguf_header.Header(header.metadata | changed, header.tensors)
    if "llama__rope__dimension_count" in metadata:
        header.metadata["llama.attention.key_length"] = K
    with pytest.raises(ValueError, match=message) as error:
        gguf_files._config(header, gguf_files.GGUFTensors(whole, header, gguf), "tiny.gguf")
        gguf_tokenizer.make(header.metadata, "tiny.gguf")
    assert "tiny.gguf" in str(error.value)
