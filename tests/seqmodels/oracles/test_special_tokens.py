"""What files say of tokens, as transformers reads it: of folders, of what we write of them, of a
run's and a GGUF file's."""

import json

import numpy as np
import pytest
import tokenizers
import torch
import transformers

import seqmodels
from experiments.inference import pretrained
from seqmodels import checkpoints_io, loading
from seqmodels.checkpoints_io import special_tokens
from seqmodels.text import chat_templates, sampling
from seqmodels.text.tokenizers import bytes_as_file
from tests.seqmodels.checkpoints_io import test_gguf_sentencepiece as sentencepiece

SPECIAL = ["<s>", "</s>", "<turn>", "<pad>", "<tool>"]
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
MESSAGES = [
    {"role": "system", "content": "w1 <b>\n", "name": None},
    {"role": "user", "content": "w2 & 'w3' é"},
    {"role": "assistant", "content": " w4", "reasoning": "w6"},
    {"role": "user", "content": "w5"},
]
# The parts that published templates are made of.
TEMPLATE = """{{- bos_token }}{{ strftime_now('%d %B %Y') }}
{%- set ns = namespace(turns=0) %}
{% if tools is not none %}
  {{- tools | tojson(indent=2) }}
{% elif documents %}
  {%- for d in documents %}{{ d['title'] }}: {{ d['text'] }}{% endfor %}
{% endif %}
{%- for message in messages %}
  {%- if message['role'] == 'system' %}
    {{- message['content'] | trim }}{{ message.name is defined }}
    {%- continue %}
  {%- endif %}
  {% set ns.turns = ns.turns + 1 %}
  {%- if message['role'] == 'assistant' -%}
    {% generation %}{{ message | tojson }}{{ message.reasoning_content }}{{ eos_token }}{% endgeneration %}
  {%- elif message['role'] not in ('user', 'tool') %}
    {{- raise_exception('no such role') }}
  {%- else %}
    {{- ns.turns }}{{ message['content'] }}{{ image_token }}
  {% endif %}
{% endfor %}
{% if add_generation_prompt %}<turn>{{ pad_token }}{{ unk_token }}{% endif %}
"""


def write_folder(folder, described, generation=None, template=None, **ids):
    folder.mkdir()
    words = {word: i for i, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(35))])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    config = transformers.LlamaConfig(
        **(SIZES | {"bos_token_id": None, "eos_token_id": None} | ids)
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").unlink()
    described = {"tokenizer_class": "PreTrainedTokenizerFast"} | described
    files = {"tokenizer_config.json": described, "generation_config.json": generation}
    for name, fields in files.items():
        if fields is not None:
            (folder / name).write_text(json.dumps(fields))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


NAMES = {
    "bos_token": "<s>",
    "eos_token": {"__type": "AddedToken", "content": "<turn>"},
    "image_token": "w9",
    "add_bos_token": True,  # of no effect where there is a tokenizer.json
}
TOOLS = [{"name": "rectangle \u00e9", "unsafe": "<script>"}]
DOCUMENTS = [{"title": "T", "text": "D"}]


def read_alike(folder):
    """Asserts that transformers and we read the same of a folder; returns what we read."""
    found = checkpoints_io.load_pretrained(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ends = model.generation_config.eos_token_id
    assert found.tokens.eos == tuple(ends if isinstance(ends, list) else [ends])
    assert found.tokens.bos == model.generation_config.bos_token_id
    assert found.tokens.names == theirs.special_tokens_map
    loaded = loading.with_tokenizer(found)
    text = "w1 w2<turn> w3"
    assert loaded.encode(text) == theirs(text)["input_ids"]
    if found.tokens.chat_templates:
        for options in ({}, {"tools": TOOLS}, {"documents": DOCUMENTS}):
            ids = theirs.apply_chat_template(
                MESSAGES, add_generation_prompt=True, return_dict=False, **options
            )
            assert loaded.chat_tokens(MESSAGES, **options) == ids
            name = (
                "tool_use"
                if "tools" in options and "tool_use" in found.tokens.chat_templates
                else "default"
            )
            shown = chat_templates.render(
                found.tokens.chat_templates[name], MESSAGES, found.tokens.names, **options
            )
            assert shown == theirs.apply_chat_template(
                MESSAGES, add_generation_prompt=True, tokenize=False, **options
            )
    return found


@pytest.mark.parametrize("kind", ["file", "field", "named", "files"])
def test_folders_and_what_becomes_of_them(kind, tmp_path):
    described, template = dict(NAMES), None
    if kind == "field":
        described["chat_template"] = TEMPLATE
    elif kind == "named":
        pairs = {"default": TEMPLATE, "tool_use": "{{ tools | tojson }}"}.items()
        described["chat_template"] = [{"name": n, "template": t} for n, t in pairs]
    else:
        template = TEMPLATE
    generation = {"bos_token_id": 0, "eos_token_id": [2, 1], "pad_token_id": 3}
    folder = write_folder(
        tmp_path / "a", described, generation, template, bos_token_id=0, eos_token_id=1
    )
    if kind == "files":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    found = read_alike(folder)
    pretrained.write(found, "workdir", tmp_path / "run")
    pretrained.write(loading.find(str(tmp_path / "run")), "llama", tmp_path / "b")
    assert read_alike(tmp_path / "b").tokens == found.tokens


@pytest.mark.parametrize(
    "described, generation, ids",
    [
        (NAMES, None, {"bos_token_id": 0, "eos_token_id": 1}),
        (NAMES, None, {"bos_token_id": 0, "eos_token_id": [1, 2]}),
        (NAMES | {"pad_token": "<pad>"}, {"eos_token_id": 2, "bos_token_id": 0}, {"eos_token_id": 1}),
        ({"bos_token": None, "extra_special_tokens": {"tool_token": "<tool>"}}, None, {"bos_token_id": 0, "eos_token_id": 2}),
    ],
)  # fmt: skip
def test_which_file_counts(described, generation, ids, tmp_path):
    folder = write_folder(tmp_path / "a", described, generation, **ids)
    found = read_alike(folder)
    pretrained.write(found, "llama", tmp_path / "b")
    assert read_alike(tmp_path / "b").tokens == found.tokens


def test_generation_ends_where_theirs_does(tmp_path):
    folder = write_folder(tmp_path / "a", NAMES, {"bos_token_id": 0, "eos_token_id": [1, 2]})
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():  # whatever is read, <turn> comes next
        model.model.embed_tokens.weight.zero_()[:, 0] = 1.0
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight.zero_()[2, 0] = 5.0
    model.save_pretrained(folder)
    theirs = model.generate(
        torch.tensor([[0, 7]]), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    loaded = seqmodels.load(str(folder))
    ours = [0, 7]
    for token_B in sampling.stream_batch(loaded.model, loaded.params, [ours], 6, temperature=0):
        ours = [*ours, int(token_B[0])]
        if ours[-1] in loaded.stop_tokens:
            break
    assert ours == theirs[0].tolist() == [0, 7, 2]


def test_a_sentencepiece_tokenizer_of_a_gguf_file(tmp_path):
    fields = sentencepiece.metadata(eot_token_id=3)
    fields["tokenizer.chat_template"] = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    path = sentencepiece.gguf_tokenizer.tokenizer_file(fields, "tiny.gguf")
    config = transformers.LlamaConfig(**(SIZES | {"vocab_size": len(sentencepiece.TOKENS)}))
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    special_tokens.write(tmp_path, special_tokens.read(path.parent), path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    loaded = seqmodels.load(str(tmp_path))
    assert theirs.special_tokens_map == loaded.found.tokens.names
    random = np.random.default_rng(0)
    for length in random.integers(0, 20, 50):
        text = "".join(random.choice([*"abbc  é\n", "<end>", "<tool>"], length))
        assert loaded.encode(text) == theirs(text)["input_ids"]
        ids = loaded.encode(text)
        assert loaded.tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    messages = [{"role": "user", "content": "ab c"}]
    assert loaded.chat_tokens(messages) == theirs.apply_chat_template(messages, return_dict=False)


def test_bytes_as_a_tokenizers_file():
    tokens = checkpoints_io.SpecialTokens(bos=256, eos=(256,))
    path = special_tokens.keep(bytes_as_file(), tokens)
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent)
    text = "\x00\t\n a1 \u00e9\u4f60\U0001f642"
    ids = [256, *text.encode()]
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids, skip_special_tokens=True) == text
    assert theirs.eos_token_id == theirs.bos_token_id == 256
