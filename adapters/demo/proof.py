"""The proof at the end of a demo: three engines' greedy answers to the same prompts, compared token by token.

The live engine was updated version by version; the fresh one was started on the exported folder. If the live one
holds exactly the trainer's weights they say the same, and both say something else than before training.

    proof = Proof((PromptProof("import ", before, live, fresh),))
    proof.faults()      # () when it holds
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Answer:
    """What an engine generated greedily, and the label of the weights that it said it used."""

    token_ids: tuple[int, ...]
    text: str
    weight_version: str


@dataclass(frozen=True, slots=True)
class PromptProof:
    """One prompt and its three answers."""

    prompt: str
    before: Answer  # the engine before the first version
    live: Answer  # the same engine, at the last version
    fresh: Answer  # a new engine on the exported folder


@dataclass(frozen=True, slots=True)
class Proof:
    """The answers to all prompts."""

    prompts: tuple[PromptProof, ...]
    last_version: int

    @property
    def equal(self) -> bool:
        """Whether the live and the fresh engine gave the same tokens for every prompt."""
        return all(prompt.live.token_ids == prompt.fresh.token_ids for prompt in self.prompts)

    @property
    def changed(self) -> bool:
        """Whether training changed the tokens of at least one prompt."""
        return any(prompt.live.token_ids != prompt.before.token_ids for prompt in self.prompts)

    def faults(self) -> tuple[str, ...]:
        """Why the proof fails, a sentence each; empty when it holds."""
        faults = []
        if not self.prompts or any(not answer.token_ids for prompt in self.prompts for answer in _answers(prompt)):
            faults.append("an engine generated no tokens, so nothing was compared")
        if not self.equal:
            faults.append(
                f"the live engine at version {self.last_version} and a fresh engine on the exported folder "
                "gave different tokens: the engine does not hold the trainer's weights"
            )
        if not self.changed:
            faults.append(
                "training left the tokens of every prompt as they were: the engine took no update, or none showed"
            )
        if any(_number(prompt.live.weight_version) != self.last_version for prompt in self.prompts):
            labels = sorted({prompt.live.weight_version for prompt in self.prompts})
            faults.append(f"the live engine answered with version {', '.join(labels)}, not {self.last_version}")
        return tuple(faults)


def _answers(prompt: PromptProof) -> tuple[Answer, Answer, Answer]:
    return prompt.before, prompt.live, prompt.fresh


def _number(label: str) -> int | None:
    """The version number of an engine's label `<epoch>.<number>`; None for a label of another kind."""
    number = label.rpartition(".")[2]
    return int(number) if number.isdecimal() else None
