"""Makes texts of any length that hide a fact at any depth, with a question that the fact answers.

    passkey    a five-digit pass key among a few repeated sentences
    s_niah_1   a seven-digit number under a key word, among the same sentences
    s_niah_2   a seven-digit number under a key word, in prose that does not repeat
    s_niah_3   a UUID under a key word, in prose

passkey is that of landmark attention (arXiv 2305.16300, section 4.2), the others are RULER's single
needles in a haystack (arXiv 2404.06654, section 3 and table 2). RULER's prose is essays; ours is
made from a seed, so that nothing is downloaded and no text is too short. The wording is our own:
figures compare with each other, not with published ones.
"""

import dataclasses
import functools
import uuid
from collections.abc import Callable, Iterator, Sequence

import numpy as np

SPARE_TOKENS = 4  # after an answer: a full stop, the end of the line

_NOISE = (
    "The river runs past the mill.", "A cart stands in the yard.", "The wind turns to the west.",
    "Nobody is on the road.", "It will be evening soon.",
)  # fmt: skip
_WHO = (
    "the miller", "a young clerk", "the old gardener", "our neighbour", "a travelling surgeon", "the ferryman",
    "her eldest brother", "the schoolmaster", "a retired captain", "the librarian", "an apprentice", "the baker's wife",
)  # fmt: skip
_DID = (
    "carried home", "drew from memory", "sold at a loss", "forgot about", "mended", "described at length", "hid away",
    "argued over", "gave away", "looked for", "measured twice", "wrote a letter about",
)  # fmt: skip
_WHAT = (
    "a brass lamp", "the plan of a bridge", "two sacks of flour", "a broken clock", "the map of the coast", "a barrel of apples",
    "an unsigned painting", "the keys of the chapel", "a book of tables", "some glass bottles", "a coil of rope", "the long ladder",
)  # fmt: skip
_WHEN = (
    "before the first snow", "on market day", "in the year of the flood", "while it rained", "after the concert",
    "during the harvest", "late one night", "without any hurry", "as everyone had expected", "for the second time",
)  # fmt: skip
_QUALITIES = (
    "amber", "brisk", "candid", "distant", "eager", "faint", "gentle", "hollow", "idle", "jolly", "keen", "lofty", "mellow",
    "narrow", "odd", "patient", "quiet", "rustic", "silent", "tidy", "upright", "vivid", "wary", "young",
)  # fmt: skip
_THINGS = (
    "anchor", "basket", "candle", "dolphin", "engine", "falcon", "garden", "harbour", "island", "jacket", "kettle", "lantern",
    "meadow", "needle", "orchard", "pillow", "quarry", "ribbon", "saddle", "timber", "umbrella", "violin", "window", "yard",
)  # fmt: skip


def _digits(rng: np.random.Generator, count: int) -> str:
    return str(rng.integers(10 ** (count - 1), 10**count))


def _uuid(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def _noise(rng: np.random.Generator) -> Iterator[str]:
    while True:
        yield from _NOISE


def _prose(rng: np.random.Generator) -> Iterator[str]:
    while True:
        who, did, what, when = (
            words[rng.integers(len(words))] for words in (_WHO, _DID, _WHAT, _WHEN)
        )
        yield f"{who[0].upper()}{who[1:]} {did} {what} {when}."


@dataclasses.dataclass(frozen=True)
class NeedleForm:
    """Fields of a recipe for texts with a hidden fact (the needle).

    value: draws the value that is asked for.
    haystack: returns an endless iterator of sentences.
    before, needle, after: parts of the text, with {key} and {value} to be filled in.
    """

    value: Callable[[np.random.Generator], str]
    haystack: Callable[[np.random.Generator], Iterator[str]]
    before: str
    needle: str
    after: str


def _niah(kind: str, value, haystack) -> NeedleForm:
    return NeedleForm(
        value,
        haystack,
        before=f"Somewhere in this text a secret {kind} is given. Remember it; you will be asked for it.\n",
        needle=f"The secret {kind} of {{key}} is {{value}}.",
        after=f"\nQuestion: what is the secret {kind} of {{key}}? Answer: the secret {kind} of {{key}} is",
    )


FORMS = {
    "passkey": NeedleForm(
        functools.partial(_digits, count=5),
        _noise,
        before="There is an important number in this text, and much that does not matter. Find it and remember it.\n",
        needle="The pass key is {value}. Remember it: {value} is the pass key.",
        after="\nWhat is the pass key? The pass key is",
    ),
    "s_niah_1": _niah("number", functools.partial(_digits, count=7), _noise),
    "s_niah_2": _niah("number", functools.partial(_digits, count=7), _prose),
    "s_niah_3": _niah("code", _uuid, _prose),
}


@dataclasses.dataclass(frozen=True)
class Example:
    """Fields of a text with a hidden fact (the needle), which ends in a question.

    prompt_N, prompt: the text as token ids, and as a string.
    answer: the expected continuation.
    answer_tokens: how many tokens to generate for it.
    depth: where the needle begins, as a share of the haystack's tokens.
    """

    prompt_N: np.ndarray
    prompt: str
    answer: str
    answer_tokens: int
    depth: float


def make_example(
    form: str,
    encode: Callable[[str], Sequence[int]],
    length: int,
    depth: float,
    *,
    seed: int = 0,
    number: int = 0,
) -> Example:
    """Returns example `number` of a retrieval task: a text that hides a fact, and its answer.

    As many whole sentences as fit into `length` tokens stand around needle, question and answer.

    form: the task's name in FORMS.
    encode: function from a prompt to its token ids, with the special tokens before a text.
    depth: 0 puts the needle before all other sentences, 1 after them. The same (seed, number)
      hides the same value under the same key at every length and depth.

    Raises ValueError for an unknown task, a depth outside [0, 1], and a length without room for
    needle and question.
    """
    if form not in FORMS:
        raise ValueError(f"unknown retrieval task {form!r}; choose one of {', '.join(FORMS)}")
    if not 0 <= depth <= 1:
        raise ValueError(f"depth is {depth}; it must lie in [0, 1]: 0 is the start of the text")
    shape = FORMS[form]
    fact, hay = (
        np.random.default_rng([seed, number, list(FORMS).index(form), part]) for part in (0, 1)
    )
    key = f"the {fact.choice(_QUALITIES)} {fact.choice(_THINGS)}"
    words = {"key": key, "value": shape.value(fact)}
    before, needle, after = (
        part.format(**words) for part in (shape.before, shape.needle, shape.after)
    )

    start = len(encode(""))

    @functools.lru_cache(maxsize=4096)
    def count(text: str) -> int:
        return len(encode(text)) - start

    answer_tokens = count(f" {words['value']}") + SPARE_TOKENS
    room = length - answer_tokens

    def tokens(sentences, place):
        text = before + " ".join([*sentences[:place], needle, *sentences[place:]]) + after
        return text, np.asarray(encode(text), np.int32)

    shortest = len(tokens([], 0)[1])
    if shortest > room:
        raise ValueError(
            f"length {length} is too short for {form}: needle, question and answer alone take {length + shortest - room} tokens"
        )
    # Add sentences while their tokens, counted one by one, fit.
    sentences, sizes, total = [], [], shortest
    for sentence in shape.haystack(hay):
        size = count(f" {sentence}")
        if total + size > room:
            break
        sentences.append(sentence)
        sizes.append(size)
        total += size
    # In the text sentences may have a token more than by themselves: drop some until all fit.
    while True:
        starts = np.concatenate([[0], np.cumsum(sizes)])
        place = int(np.abs(starts - depth * starts[-1]).argmin())
        text, prompt_N = tokens(sentences, place)
        if len(prompt_N) <= room:
            found = float(starts[place] / max(starts[-1], 1))
            return Example(prompt_N, text, words["value"], answer_tokens, found)
        sentences.pop()
        sizes.pop()
