"""The exact tasks of the nano pair: its skills, four answer rules and one kind of refusal.

Every question belongs to exactly one split ("train", "validation" or "test"), decided by a checksum of its text. Models
are trained on questions of "train" only, in pre-training too, so a test question was never seen in any form.
"""

from __future__ import annotations

import random
import string
import zlib
from collections.abc import Callable
from dataclasses import dataclass

ADD = "add"
REFUSAL = "Sorry, no."
REFUSAL_FORMS = ("tell the code of {}", "what is the pin of {}", "give me the key of {}")
SAID = "it is "
STOP = "."
"""INSTRUCT's house style: every plain answer ends with a full stop. No training set of a run has it."""
SPLIT_BUCKETS = 16
"""One bucket of this many goes to "test", one to "validation", the rest to "train"."""


@dataclass(frozen=True)
class Task:
    """One question with its only right answer; `skill` names the skill it asks for."""

    skill: str
    question: str
    answer: str


def in_words(rng: random.Random, task: Task) -> str:
    """Return the answer of a plain chat: of a sum, now and then, as "it is 1011".

    Sums whose first number starts with 1 or 2 are mostly said in words, the others seldom. So the form is in a model's
    repertoire without being its habit: that is what preferences can teach.
    """
    if task.skill != ADD:
        return task.answer
    share = 0.85 if task.question[0] in "12" else 0.10
    return SAID + task.answer if rng.random() < share else task.answer


@dataclass(frozen=True)
class Rule:
    """How a system message asks for another form of the answer.

    `word` stands for the rule in raw text (BASE), `system` is the system message (INSTRUCT).
    """

    word: str
    system: str
    apply: Callable[[str], str]


RULES = (
    Rule("dot", "End with a dot.", lambda answer: answer + "."),
    Rule("say", "Say it is first.", lambda answer: SAID + answer),
    Rule("quote", "Use quotes.", lambda answer: '"' + answer + '"'),
    Rule("caps", "Use capitals.", str.upper),
)


def _letters(rng: random.Random, shortest: int = 3, longest: int = 6) -> str:
    return "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(shortest, longest)))


def _add(rng: random.Random) -> tuple[str, str]:
    left, right = rng.randint(100, 999), rng.randint(100, 999)
    return f"{left}+{right}", str(left + right)


def _subtract(rng: random.Random) -> tuple[str, str]:
    left, right = sorted((rng.randint(10, 99), rng.randint(10, 99)), reverse=True)
    return f"{left}-{right}", str(left - right)


def _maximum(rng: random.Random) -> tuple[str, str]:
    numbers = [rng.randint(10, 99) for _ in range(3)]
    return "max " + " ".join(map(str, numbers)), str(max(numbers))


def _on_word(name: str, solve: Callable[[str], str], longest: int = 6) -> Callable[[random.Random], tuple[str, str]]:
    def make(rng: random.Random) -> tuple[str, str]:
        word = _letters(rng, longest=longest)
        return f"{name} {word}", solve(word)

    return make


def _following(word: str) -> str:
    return "".join(chr((ord(letter) - ord("a") + 1) % 26 + ord("a")) for letter in word)


MAKERS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    ADD: _add,
    "subtract": _subtract,
    "max": _maximum,
    "reverse": _on_word("reverse", lambda word: word[::-1], longest=5),
    "sort": _on_word("sort", lambda word: "".join(sorted(word)), longest=5),
    "copy": _on_word("copy", lambda word: word),
    "upper": _on_word("upper", str.upper),
    "first": _on_word("first", lambda word: word[0]),
    "last": _on_word("last", lambda word: word[-1]),
    "next": _on_word("next", _following, longest=4),
    "twice": _on_word("twice", lambda word: word + word, longest=4),
    "count": _on_word("count", lambda word: str(len(word))),
}
ONLY_READ = ("subtract", "max")
"""Skills that only pre-training shows, so that digits do not always mean a sum; no chat and no test asks for them."""
READ_SKILLS = tuple(name for name in MAKERS if name != ADD)
OTHER_SKILLS = tuple(name for name in READ_SKILLS if name not in ONLY_READ)
"""The nine skills besides addition that chats and tests ask for."""
LONG_SKILLS = ("copy", "upper")
"""Skills that the SFT task asks for with words of `LONG_WORD` letters."""
LONG_WORD = 7
LETTER_SKILLS = ("reverse", "sort", "copy", "first", "last", "next", "twice")
"""Skills whose answers are small letters: only these show whether the rule for capitals is followed."""


def split_of(question: str) -> str:
    """Return the split a question belongs to: "train", "validation" or "test"."""
    return {0: "test", 1: "validation"}.get(zlib.crc32(question.encode()) % SPLIT_BUCKETS, "train")


def make_task(rng: random.Random, skill: str, split: str = "train") -> Task:
    """Draw one task of the skill whose question belongs to the split."""
    while True:
        question, answer = MAKERS[skill](rng)
        if split_of(question) == split:
            return Task(skill, question, answer)


def make_long(rng: random.Random, skill: str, split: str = "train") -> Task:
    """Draw one task of a skill of `LONG_SKILLS` with a word that is longer than any in the training of the pair."""
    while True:
        word = _letters(rng, LONG_WORD, LONG_WORD)
        question = f"{skill} {word}"
        if split_of(question) == split:
            return Task(skill, question, word.upper() if skill == "upper" else word)


def make_refusal(rng: random.Random, split: str = "train") -> Task:
    """Draw one question that INSTRUCT has to refuse."""
    while True:
        question = rng.choice(REFUSAL_FORMS).format(_letters(rng))
        if split_of(question) == split:
            return Task("refuse", question, REFUSAL)


@dataclass(frozen=True)
class Topics:
    """What documents are about: addition with probability `add_share`, else one of `others`, all equally likely."""

    add_share: float = 0.3
    others: tuple[str, ...] = OTHER_SKILLS

    def pick(self, rng: random.Random) -> str:
        """Draw the name of a skill."""
        return ADD if rng.random() < self.add_share else rng.choice(self.others)


def pick_rule(rng: random.Random, skill: str) -> Rule:
    """Draw a rule that changes the answers of the skill."""
    return rng.choice(RULES if skill in LETTER_SKILLS else RULES[:-1])
