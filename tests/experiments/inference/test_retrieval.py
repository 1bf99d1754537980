import functools

import numpy as np
import pytest

from experiments.data import needles
from experiments.inference import retrieval
from seqmodels import checkpoints_io, loading
from seqmodels.text import sampling
from seqmodels.text.tokenizers import make_tokenizer

BYTES = make_tokenizer("bytes")


def prompts(tokenizer):
    """A prompt as the start of a document."""
    return functools.partial(sampling.prompt_tokens, tokenizer=tokenizer)


class Words:
    """A token a word; the ids of the words that it has met."""

    document_id = 0

    def __init__(self):
        self.ids = {}

    def encode(self, text):
        return np.array([self.ids.setdefault(w, len(self.ids) + 1) for w in text.split()], np.int32)


@pytest.mark.parametrize("form", needles.FORMS)
@pytest.mark.parametrize("tokenizer", [BYTES, Words()], ids=["bytes", "words"])
def test_a_text_has_the_length_and_the_needle_the_depth_asked_for(form, tokenizer):
    values = set()
    for number, depth in enumerate((0.0, 0.3, 1.0)):
        short, long = (
            needles.make_example(form, prompts(tokenizer), length, depth, seed=3, number=number)
            for length in (900, 4000)
        )
        values.add(long.answer)
        assert short.answer == long.answer
        for example, length in ((short, 900), (long, 4000)):
            taken = len(example.prompt_N) + example.answer_tokens
            longest_sentence = 90 if tokenizer is BYTES else 15
            assert length - longest_sentence < taken <= length
            assert example.prompt_N[0] == tokenizer.document_id
            np.testing.assert_array_equal(example.prompt_N[1:], tokenizer.encode(example.prompt))
            assert example.prompt.count(example.answer) == (2 if form == "passkey" else 1)
            assert example.depth == pytest.approx(depth, abs=0.1)
            place = example.prompt.index(example.answer) / len(example.prompt)
            assert place == pytest.approx(0.1 + 0.8 * depth, abs=0.25)
    assert len(values) == 3
    again = needles.make_example(form, prompts(tokenizer), 4000, 1.0, seed=3, number=2)
    assert again.prompt == long.prompt
    other = needles.make_example(form, prompts(tokenizer), 4000, 1.0, seed=4, number=2)
    assert other.prompt != long.prompt and other.answer != long.answer


@pytest.mark.parametrize("start", [[], [5, 6]])
def test_a_prompt_is_what_the_encoder_makes_of_it(start):
    """A pretrained model's puts other tokens before a text, or none."""

    def encode(text):
        return [*start, *BYTES.encode(text)]

    example = needles.make_example("s_niah_2", encode, 900, 0.5)
    assert example.prompt_N.tolist() == encode(example.prompt)
    assert 810 < len(example.prompt_N) + example.answer_tokens <= 900


def test_forms_are_what_their_source_says():
    def text(form):
        return needles.make_example(form, prompts(BYTES), 3000, 0.5)

    assert len(text("passkey").answer) == 5 and text("passkey").answer.isdigit()
    assert len(text("s_niah_1").answer) == 7 and text("s_niah_2").answer.isdigit()
    assert len(text("s_niah_3").answer) == 36
    for form in ("passkey", "s_niah_1"):
        assert text(form).prompt.count("The river runs past the mill.") > 10
    sentences = text("s_niah_2").prompt.split(". ")
    assert len(set(sentences)) > 0.9 * len(sentences)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ("s_niah_9", prompts(BYTES), 500, 0.5),
            "unknown retrieval task 's_niah_9'; choose one of passkey",
        ),
        (("passkey", prompts(BYTES), 500, 1.5), "depth is 1.5"),
        (
            ("s_niah_3", prompts(BYTES), 100, 0.5),
            r"length 100 is too short for s_niah_3: .* take \d+ tokens",
        ),
    ],
)
def test_what_cannot_be_made_is_told(arguments, message):
    with pytest.raises(ValueError, match=message):
        needles.make_example(*arguments)


def of_bytes(**fields):
    """A loaded model of bytes without parameters."""
    config = {"vocab_size": 257, "d_model": 8, "num_layers": 1} | fields
    found = checkpoints_io.Pretrained(config, None, {"tokenizer": "bytes"}, "here")
    return loading.with_tokenizer(found)


def test_accuracy_is_counted_by_length_and_depth(monkeypatch):
    """A reader that sees the last 500 bytes finds what is there, and nothing else."""
    loaded = of_bytes(pattern="gla(num_heads=1)")

    def generate(model, prompts, *, max_new_tokens, stop, batch_size):
        assert model is loaded and stop == "\n" and batch_size == 8
        texts = []
        for prompt in prompts:
            text = BYTES.decode(prompt)
            seen = text[-500:].replace(text[-40:], "")
            digits = [w.strip(".:") for w in seen.split() if w.strip(".:").isdigit()]
            texts.append(f" {digits[0]}." if digits else " nothing")
            assert len(prompt) + max_new_tokens <= 2000
        return texts

    monkeypatch.setattr(loading.LoadedModel, "generate", generate)
    tasks, lengths, depths = ["passkey", "s_niah_2"], [1000, 2000], [0.0, 1.0]
    rows = retrieval.evaluate(loaded, tasks, lengths, depths, examples=4)
    assert len(rows) == 8
    assert {(row["depth"], row["accuracy"]) for row in rows} == {(0.0, 0.0), (1.0, 1.0)}
    table = retrieval.table(rows)
    assert "passkey" in table and "2,000" in table and "0.00   1.00" in table


def test_a_context_beyond_the_cache_is_refused_before_anything_is_generated():
    loaded = of_bytes(pattern="attention(num_heads=1, max_length=600)")
    message = "do not fit into the cache of attention layers, max_length=600"
    with pytest.raises(ValueError, match=message):
        retrieval.evaluate(loaded, ["passkey"], [500, 1000], [0.5], examples=1)
