"""The embedded engine in process: the tokens of transformers, whole updates, and one version an answer."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.adapters.conftest import Checkpoint, make_checkpoint
from tests.adapters.models import NUM_TOKENS, PROMPT, greedy_tokens
from tests.adapters.trainer_side import wait_until

from weightcast.adapters.conformance import make_faults
from weightcast.adapters.engine import Completion
from weightcast.adapters.transformers.engine import Sampling, TransformersEngine
from weightcast.sync import Version
from weightcast.sync.errors import CheckpointMismatch, EngineError, ModelMismatch

V1 = Version(7, 1)


@pytest.fixture
def engine(first: Checkpoint) -> TransformersEngine:
    return TransformersEngine(first.folder, admission_timeout_s=30)


def load(engine: TransformersEngine, tensors: dict[str, torch.Tensor]) -> None:
    engine.pause("wait", 10)
    try:
        engine.load(V1, tensors.items())
    finally:
        engine.resume()


def test_tokens_are_those_of_transformers(engine: TransformersEngine, first: Checkpoint) -> None:
    assert engine.generate(PROMPT, NUM_TOKENS) == Completion(greedy_tokens(first.model), "default", "length")


def test_an_update_brings_the_tokens_of_its_checkpoint(engine: TransformersEngine, second: Checkpoint) -> None:
    load(engine, second.tensors)
    assert engine.generate(PROMPT, NUM_TOKENS) == Completion(greedy_tokens(second.model), "7.1", "length")


@pytest.mark.parametrize("index", range(6))
def test_a_spoiled_set_is_refused_untouched(
    engine: TransformersEngine, first: Checkpoint, second: Checkpoint, index: int
) -> None:
    fault = make_faults(second.tensors)[index]
    with pytest.raises(ModelMismatch, match=fault.tensor):
        load(engine, fault.tensors)
    assert engine.generate(PROMPT, NUM_TOKENS) == Completion(greedy_tokens(first.model), "default", "length")


def test_a_load_without_a_pause_is_refused(engine: TransformersEngine, second: Checkpoint) -> None:
    with pytest.raises(ModelMismatch, match="pause before a load"):
        engine.load(V1, second.tensors.items())


def test_a_load_that_breaks_off_poisons_the_engine(engine: TransformersEngine, second: Checkpoint) -> None:
    name = next(reversed(second.tensors))
    without_data = {**second.tensors, name: second.tensors[name].to("meta")}
    with pytest.raises(EngineError, match=r"undefined since loading version 1 \(epoch 7\) broke off.*restart"):
        load(engine, without_data)
    with pytest.raises(EngineError, match="does not serve"):
        engine.generate(PROMPT, 1)
    assert engine.label == "default"


def test_tied_models_take_both_forms_of_their_checkpoint(tmp_path: Path) -> None:
    tied = make_checkpoint(3, tmp_path / "tied", tied=True)
    other = make_checkpoint(4, tmp_path / "other", tied=True)
    engine = TransformersEngine(tied.folder)
    assert "lm_head.weight" not in other.tensors
    load(engine, other.tensors)
    assert engine.generate(PROMPT, NUM_TOKENS).token_ids == greedy_tokens(other.model)
    load(engine, {**tied.tensors, "lm_head.weight": tied.tensors["model.embed_tokens.weight"].clone()})
    assert engine.generate(PROMPT, NUM_TOKENS).token_ids == greedy_tokens(tied.model)
    with pytest.raises(ModelMismatch, match="are one tensor in the engine"):
        load(engine, {**tied.tensors, "lm_head.weight": torch.zeros(256, 64)})


def test_the_element_type_in_memory_may_differ_from_the_file(first: Checkpoint, second: Checkpoint) -> None:
    engine = TransformersEngine(first.folder, dtype=torch.bfloat16)
    load(engine, second.tensors)
    fresh = TransformersEngine(second.folder, dtype=torch.bfloat16)
    assert engine.generate(PROMPT, NUM_TOKENS).token_ids == fresh.generate(PROMPT, NUM_TOKENS).token_ids


def test_a_seed_repeats_a_sample(engine: TransformersEngine) -> None:
    samples = [engine.sample(PROMPT, Sampling(8, temperature=1.5, seed=seed)).token_ids for seed in (5, 5, 6)]
    assert samples[0] == samples[1] != samples[2]


def test_an_engine_needs_weights_to_start_on(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatch, match=r"has neither model\.safetensors nor"):
        TransformersEngine(tmp_path)


class LongRequest:
    """A completion of many tokens in a thread."""

    def __init__(self, engine: TransformersEngine, num_tokens: int) -> None:
        self.completion: Completion | None = None
        self._engine, self._num_tokens = engine, num_tokens
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        self.completion = self._engine.generate(PROMPT, self._num_tokens)


@pytest.fixture
def long_request(engine: TransformersEngine) -> Iterator[LongRequest]:
    request = LongRequest(engine, 400)
    wait_until(lambda: engine.gate.num_running == 1, "the request to run", 10)
    yield request
    request.thread.join(60)
    assert not request.thread.is_alive()


def test_a_kept_request_starts_again_on_the_new_version(
    engine: TransformersEngine, long_request: LongRequest, second: Checkpoint
) -> None:
    engine.pause("keep", 10)
    engine.load(V1, second.tensors.items())
    engine.resume()
    long_request.thread.join(60)
    assert long_request.completion == Completion(greedy_tokens(second.model, num=400), "7.1", "length")


def test_a_kept_request_goes_on_when_the_weights_are_the_same(
    engine: TransformersEngine, long_request: LongRequest, first: Checkpoint
) -> None:
    engine.pause("keep", 10)
    engine.resume()
    long_request.thread.join(60)
    assert long_request.completion == Completion(greedy_tokens(first.model, num=400), "default", "length")


def test_an_aborted_request_returns_what_it_has(
    engine: TransformersEngine, long_request: LongRequest, first: Checkpoint, second: Checkpoint
) -> None:
    engine.pause("abort", 10)
    engine.load(V1, second.tensors.items())
    engine.resume()
    long_request.thread.join(60)
    done = long_request.completion
    assert done is not None
    assert (done.finish_reason, done.weight_version) == ("abort", "default")
    assert done.token_ids == greedy_tokens(first.model, num=400)[: len(done.token_ids)]
