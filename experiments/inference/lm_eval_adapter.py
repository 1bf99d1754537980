"""Adapter of our models to EleutherAI's lm-evaluation-harness (extra [eval]).

    python -m experiments.evaluate --workdir=runs/... --lm_eval_tasks=arc_easy,lambada_openai
    python -m experiments.evaluate --workdir=runs/... --lm_eval_tasks=mine --lm_eval_path=folder

How a request is tokenized (the border of context and continuation, the token before an empty
context, rolling windows) follows the harness's own model for transformers, so the same weights get
the same scores.
"""

import difflib
import logging
from collections.abc import Sequence
from typing import Any

try:
    from lm_eval import evaluator, utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ValueError(f"lm_eval tasks need the extra: pip install '.[eval]' ({error})") from error

from seqmodels.loading import LoadedModel
from seqmodels.text import sampling
from seqmodels.text.tokenizers import BYTES, fits

MAX_GENERATED = 256  # tokens, where a task does not say


class HarnessModel(TemplateLM):
    """Adapter of a loaded model: the methods that the evaluation harness calls.

    A prefix token stands before an empty context, and before a text whose perplexity is asked for.
    For models that learned documents with a start token (runs, models of bytes) it is that token,
    and stands before all other contexts, too; else it is the tokenizer's bos token or, without one,
    its eos token, as in the harness. A generated text keeps the space before its first word under
    every tokenizer; the harness's own model for transformers loses it with SentencePiece.

    batch_size: prompts generated together.
    max_length: tokens that the model may see; longer requests lose tokens from the left. None is
      the context of a pretrained model. A run then sees all tokens, up to its learned positions,
      and in generation as many as the shortest cache of a full-attention layer holds.
    """

    max_gen_toks = MAX_GENERATED
    eot_token_id, prefix_token_id, tokenizer_name = 0, 0, ""  # a tokenizer's own, set below

    def __init__(self, loaded: LoadedModel, *, batch_size: int = 8, max_length: int | None = None):
        super().__init__()
        text, vocab_size = loaded.tokenizer, loaded.model.vocab_size
        if not fits(text, vocab_size):
            raise ValueError(
                f"the tokenizer has {text.vocab_size} tokens, and the model's vocabulary "
                f"{vocab_size}: use the tokenizer that the model was trained with"
            )
        self._loaded, self._text, self._batch_size = loaded, text, batch_size
        self.eot_token_id, self.tokenizer_name = text.document_id, type(text).__name__
        tokens, limit = loaded.found.tokens, sampling.context_limit(loaded.model)
        self._cached = limit and limit[0]
        self._document_starts = loaded.starts_documents or loaded.tokenizer_name == BYTES
        if self._document_starts:
            self.prefix_token_id, context = text.document_id, loaded.model.learned_positions
        else:
            ends = next(iter(tokens.eos), text.document_id)
            self.prefix_token_id, context = ends if tokens.bos is None else tokens.bos, self._cached
        self._max_length = context if max_length is None else max_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        ids = [int(i) for i in self._text.encode(string)]
        if add_special_tokens is False:
            return ids
        begins = add_special_tokens is None and ids[:1] == [self.prefix_token_id]
        return ids if begins and not self._document_starts else self._loaded.encode(string)

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        """Returns (log probability, whether greedy decoding gives it) per request's continuation.

        requests: (texts, context's token ids, continuation's token ids) each.
        """
        sequences = []
        for _, context, continuation in requests:
            tokens = [*context, *continuation]
            sequences.append(tokens[-(self._max_length + 1) :] if self._max_length else tokens)
        scores = self._loaded.score(sequences)
        answers = []
        for (texts, _, continuation), (nll_N, correct_N) in zip(requests, scores):
            counted = slice(max(len(nll_N) - len(continuation), 0), None)
            answer = (-float(nll_N[counted].sum(dtype="float64")), bool(correct_N[counted].all()))
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
            answers.append(answer)
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for number, request in enumerate(requests):
            # The prefix stands before them in any case; the harness puts what a tokenizer's file
            # adds behind it.
            plain = False if self._document_starts else None
            tokens = self.tok_encode(request.args[0], add_special_tokens=plain)
            rolling = utils.get_rolling_token_windows(
                token_list=tokens,
                prefix_token=self.prefix_token_id,
                max_seq_len=self._max_length or max(len(tokens), 1),
                context_len=1,
            )
            for window in map(utils.make_disjoint_window, rolling):
                windows.append((None, *window))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows)):
            totals[number] += logprob
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        texts = [""] * len(requests)
        for numbers in groups.values():
            options, length, stop = _generation(requests[numbers[0]].args[1])
            prompts = [self._prompt(requests[number].args[0], length) for number in numbers]
            found = self._loaded.generate(
                prompts, max_new_tokens=length, stop=stop, batch_size=self._batch_size, **options
            )
            for number, text in zip(numbers, found):
                texts[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return texts

    def _prompt(self, context: str, length: int) -> list[int]:
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        limit = min(filter(None, (self._max_length, self._cached)), default=None)
        if limit is None:
            return tokens
        if length >= limit:
            raise ValueError(
                f"the task generates up to {length} tokens, and the model's context is {limit}: "
                "no room is left for a prompt"
            )
        return tokens[-(limit - length) :]


def _generation(asked: dict[str, Any]) -> tuple[dict[str, Any], int, list[str]]:
    """Returns (sampling options, token limit, stop strings) of a task's generation arguments."""
    asked = dict(asked)
    until = asked.pop("until", None) or []
    length = next(
        (asked.pop(name) for name in ("max_gen_toks", "max_new_tokens") if name in asked),
        MAX_GENERATED,
    )
    do_sample = asked.pop("do_sample", None)
    temperature = float(asked.pop("temperature", 0.0 if not do_sample else 1.0))
    options = {"temperature": 0.0 if do_sample is False else temperature}
    given = {name: asked.pop(name, None) for name in ("top_k", "top_p")}
    options |= {name: value for name, value in given.items() if value}  # 0 is none
    if asked:
        raise ValueError(
            f"a task asks for the generation argument {sorted(asked)[0]!r}, which is not "
            "supported; these are: until, max_gen_toks, do_sample, temperature, top_k, top_p"
        )
    return options, int(length), [until] if isinstance(until, str) else [s for s in until if s]


def run(
    harness_model: HarnessModel,
    tasks: Sequence[str],
    *,
    path: str | None = None,
    include_defaults: bool = True,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> dict[str, Any]:
    """Runs tasks of the evaluation harness; returns its "results", "n-samples" and "versions".

    "results" is task -> metric -> value.

    tasks: names of tasks.
    path: a folder with task files of your own.
    include_defaults: whether to read the harness's own tasks, too, which takes seconds.
    limit: number of examples per task; None is all.
    num_fewshot: solved examples before each; None is the task's own number.

    Raises ValueError for an unknown task, with close matches.
    """
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    manager = TaskManager(include_path=path, include_defaults=include_defaults)
    known = set(manager.all_tasks)
    for name in tasks:
        if name not in known:
            raise ValueError(_unknown(name, known, path))
    results = evaluator.simple_evaluate(
        model=harness_model,
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        num_fewshot=num_fewshot,
        bootstrap_iters=0,
        log_samples=False,
    )
    return {key: results[key] for key in ("results", "n-samples", "versions") if key in results}


def _unknown(name: str, known: set[str], path: str | None) -> str:
    near = difflib.get_close_matches(name, known, n=5)
    message = f"there is no lm_eval task {name!r}" + (
        f"; did you mean {' or '.join(near)}?" if near else "."
    )
    if path:
        own = TaskManager(include_path=path, include_defaults=False).all_tasks
        return f"{message} Tasks in {path}: {', '.join(own) or 'none'}"
    lists = f"`lm_eval ls tasks` lists all {len(known)}"
    return f"{message} {lists}; --lm_eval_path names a folder of your own"


def table(results: dict[str, Any]) -> str:
    """Returns the metrics of every task in `run`'s results as a text table."""
    lines = []
    for task, metrics in results["results"].items():
        for metric, value in metrics.items():
            if isinstance(value, float) and not metric.split(",")[0].endswith("_stderr"):
                lines.append(f"  {task:<32} {metric.split(',')[0]:<18} {value:>12.4f}")
    return "\n".join(lines)
