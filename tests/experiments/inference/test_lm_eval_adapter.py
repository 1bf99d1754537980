"""EleutherAI's harness on our models; its own model for transformers, with the same weights, is the
oracle."""

import dataclasses
import json
import math

import pytest
import tokenizers
import torch
import transformers
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import seqmodels
from experiments.inference import lm_eval_adapter
from tests.seqmodels.oracles import weights

CONTEXT = 48
TEXTS = [
    f"{a} and {b} make {a + b}; the cat saw {b} naïve 😀 mice." for a in range(9) for b in (3, 7)
]
END = "<|endoftext|>"
YAML = """
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
metadata: {{version: 1.0}}
"""
TASKS = {
    "own_choice": """
task: own_choice
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "own_perplexity": """
task: own_perplexity
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "own_words": """
task: own_words
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny llama with random weights and a tokenizer, and tasks of our own."""
    folder = tmp_path_factory.mktemp("llama")
    text = tokenizers.Tokenizer(tokenizers.models.BPE())
    text.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    text.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=[END]
    )
    text.train_from_iterator(TEXTS, trainer)
    text.post_processor = tokenizers.processors.TemplateProcessing(
        single=[END, "$A"], special_tokens=[(END, 0)]
    )
    size = text.get_vocab_size()
    config = transformers.LlamaConfig(
        vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    weights.randomize(model)
    model.save_pretrained(folder)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=text, bos_token=END, eos_token=END, pad_token=END
    )
    fast.save_pretrained(folder)
    documents = [
        {"text": t, "question": t[: t.index("make")], "choices": [" make 10;", " make", " the cat"], "answer": i % 3}
        for i, t in enumerate(TEXTS)
    ]  # fmt: skip
    documents[0]["text"] = " ".join(TEXTS)  # longer than the context: windows
    data = folder / "data.json"
    data.write_text("\n".join(json.dumps(document) for document in documents))
    (folder / "tasks").mkdir()
    for name, task in TASKS.items():
        (folder / "tasks" / f"{name}.yaml").write_text(YAML.format(data=data) + task)
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    loaded = seqmodels.load(folder, dtype="float32")
    return lm_eval_adapter.HarnessModel(loaded, batch_size=4)


@pytest.fixture(scope="module")
def theirs(folder):
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return HFLM(pretrained=model, tokenizer=fast, batch_size=4, max_length=CONTEXT, device="cpu")


def instances(kind, arguments):
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


def test_scores_are_those_of_transformers_request_by_request(ours, theirs):
    pairs = [(t[: 5 + i], t[5 + i :]) for i, t in enumerate(TEXTS)]
    # An empty context with a text from above would share that one's logits: the harness takes them
    # for the same.
    pairs += [("", "the mice saw 5 cats"), (END + TEXTS[0], " begins with its first token")]
    pairs += [("ends in spaces  ", "word"), (" ".join(TEXTS), " and more")]
    requests = instances("loglikelihood", pairs)
    found, expected = ours.loglikelihood(requests), theirs.loglikelihood(requests)
    assert [a for a, _ in found] == pytest.approx([b for b, _ in expected], abs=1e-3)
    assert [a for _, a in found] == [b for _, b in expected]
    contexts = [ours.tok_encode(t[:n]) for t in TEXTS for n in (1, 9)]
    assert contexts == [theirs.tok_encode(t[:n]) for t in TEXTS for n in (1, 9)]
    with torch.no_grad():
        last = [theirs.model(torch.as_tensor([c])).logits[0, -1].argmax() for c in contexts]
    asked = [
        (("", ""), context, [(int(token) + other) % ours._text.vocab_size])
        for context, token in zip(contexts, last)
        for other in (0, 1)
    ]
    greedy = [a for _, a in ours._loglikelihood_tokens(asked)]
    assert greedy == [True, False] * len(contexts)
    assert greedy == [b for _, b in theirs._loglikelihood_tokens(asked, disable_tqdm=True)]

    rolling = instances("loglikelihood_rolling", [(TEXTS[3],), (" ".join(TEXTS),)])
    expected = theirs.loglikelihood_rolling(rolling)
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(expected, abs=5e-3)

    asked = {"until": [" the", "\n"], "max_gen_toks": 9}
    prompts = instances("generate_until", [(t[: 9 + i], asked) for i, t in enumerate(TEXTS)])
    texts = ours.generate_until(prompts)
    assert texts == theirs.generate_until(prompts) and len(set(texts)) > 2


@pytest.mark.slow
def test_tasks_of_our_own_score_as_with_transformers(ours, theirs, folder, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    path = str(folder / "tasks")
    results = lm_eval_adapter.run(ours, list(TASKS), path=path, include_defaults=False)
    manager = TaskManager(include_path=path, include_defaults=False)
    expected = simple_evaluate(
        model=theirs, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, log_samples=False
    )
    for task in TASKS:
        for metric, value in expected["results"][task].items():
            if isinstance(value, float) and not math.isnan(value):
                assert results["results"][task][metric] == pytest.approx(value, rel=1e-4), metric
    assert results["n-samples"]["own_choice"]["effective"] == len(TEXTS)
    printed = lm_eval_adapter.table(results)
    assert "own_perplexity" in printed and "bits_per_byte" in printed and "stderr" not in printed
    with pytest.raises(ValueError, match="no lm_eval task 'own_chioce'; did you mean own_choice"):
        lm_eval_adapter.run(ours, ["own_chioce"], path=path, include_defaults=False)


def test_what_cannot_be_asked_is_told(ours, folder):
    loaded = seqmodels.load(folder, dtype="float32")
    run = lm_eval_adapter.HarnessModel(dataclasses.replace(loaded, starts_documents=True))
    assert run.tok_encode("5") == [0, *loaded.tokenizer.encode("5")]

    def generate(model, **asked):
        return model.generate_until(instances("generate_until", [("5 and", asked)]))

    for model in (ours, run):  # of the latter the cache is the limit
        with pytest.raises(ValueError, match=f"up to {CONTEXT} tokens.*context is {CONTEXT}"):
            generate(model, max_gen_toks=CONTEXT)
    with pytest.raises(ValueError, match="'num_beams', which is not supported.*top_k"):
        generate(ours, num_beams=3)
    assert len(generate(ours, until="", max_gen_toks=3, top_k=0, top_p=0.0)) == 1

    class Larger:
        vocab_size = 10_000

    with pytest.raises(ValueError, match="tokenizer has 10000 tokens"):
        lm_eval_adapter.HarnessModel(dataclasses.replace(loaded, tokenizer=Larger()))
