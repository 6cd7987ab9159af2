"""The proof at the end of a demo: three engines' answers to the same questions, compared token by token.

The live engine was updated version by version; the fresh one was started on the exported folder. If the live one
holds exactly the trainer's weights they say the same, and both say something else than before training. Some
questions are asked greedily; others are sampled with a fixed seed, because each sampled token depends on the whole
distribution and so tells even neighbouring versions apart, where a greedy one may not.

    proof = Proof((Comparison(Question("import "), before, live, fresh),), last_version=6)
    proof.faults()      # () when it holds
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, answered greedily, or at temperature 1 with `seed`."""

    prompt: str
    seed: int | None = None

    @property
    def manner(self) -> str:
        """How it is answered, in words."""
        return "greedy" if self.seed is None else f"temperature 1, seed {self.seed}"


@dataclass(frozen=True, slots=True)
class Answer:
    """What an engine generated, and the label of the weights that it said it used."""

    token_ids: tuple[int, ...]
    text: str
    weight_version: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """One question and its three answers."""

    question: Question
    before: Answer  # the engine before the first version
    live: Answer  # the same engine, at the last version
    fresh: Answer  # a new engine on the exported folder


@dataclass(frozen=True, slots=True)
class Proof:
    """The answers to all questions."""

    comparisons: tuple[Comparison, ...]
    last_version: int

    @property
    def equal(self) -> bool:
        """Whether the live and the fresh engine gave the same tokens to every question."""
        return all(each.live.token_ids == each.fresh.token_ids for each in self.comparisons)

    @property
    def changed(self) -> bool:
        """Whether training changed the greedy tokens of at least one question."""
        greedy = (each for each in self.comparisons if each.question.seed is None)
        return any(each.live.token_ids != each.before.token_ids for each in greedy)

    def faults(self) -> tuple[str, ...]:
        """Why the proof fails, a sentence each; empty when it holds."""
        faults = []
        if not self.comparisons or any(not answer.token_ids for each in self.comparisons for answer in _answers(each)):
            faults.append("an engine generated no tokens, so nothing was compared")
        if not self.equal:
            faults.append(
                f"the live engine at version {self.last_version} and a fresh engine on the exported folder "
                "gave different tokens: the engine does not hold the trainer's weights"
            )
        if not self.changed:
            faults.append("training left the greedy tokens of every prompt as they were, so they show no update")
        labels = sorted({each.live.weight_version for each in self.comparisons})
        if any(_number(label) != self.last_version for label in labels):
            faults.append(f"the live engine answered with version {', '.join(labels)}, not {self.last_version}")
        return tuple(faults)


def _answers(comparison: Comparison) -> tuple[Answer, Answer, Answer]:
    return comparison.before, comparison.live, comparison.fresh


def _number(label: str) -> int | None:
    """The version number of an engine's label `<epoch>.<number>`; None for a label of another kind."""
    number = label.rpartition(".")[2]
    return int(number) if number.isdecimal() else None
