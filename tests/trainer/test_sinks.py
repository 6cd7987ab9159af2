"""What a run leaves for others to look at: TensorBoard's files, wandb's and MLflow's runs, a bar, a picture."""

import importlib
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from tests.ranks import run_ranks
from tests.trainer.runs import words_for
from tests.trainer.test_batch_schedule import RAMP, SAMPLES
from tests.trainer.watched import train_watched
from typer.testing import CliRunner

from weightcast.cli import app
from weightcast.sync.errors import ConfigError
from weightcast.trainer.config import ConfigContainer
from weightcast.trainer.figures import EvalReport, StepReport
from weightcast.trainer.overrides import load_config
from weightcast.trainer.plots import read_run
from weightcast.trainer.progress import ProgressBar, is_wanted
from weightcast.trainer.sinks import step_figures

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run writes."""
    return tmp_path_factory.mktemp("sinks")


@pytest.fixture(scope="module")
def ran(qwen3: Path, texts: list[Path], folder: Path) -> dict[str, Any]:
    """Four steps with two evaluations, told to a file of events and to TensorBoard."""
    pytest.importorskip("tensorboard")
    words = [
        *words_for(qwen3, texts, folder / "cache"),
        "dataset.split=80,20,0",
        "train.eval_interval=2",
        f"logger.events={folder / 'events.jsonl'}",
        f"logger.tensorboard_dir={folder / 'board'}",
    ]
    (result,) = run_ranks(train_watched, 1, {"run": {"words": words}})
    found: dict[str, Any] = result["run"]
    return found


def test_tensorboard_has_the_figures(ran: dict[str, Any], folder: Path) -> None:
    accumulator: Any = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")

    board = accumulator.EventAccumulator(str(folder / "board"))
    board.Reload()
    losses = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert losses == [(step + 1, pytest.approx(loss)) for step, loss in enumerate(ran["loss"])]
    assert [event.value for event in board.Scalars("validation/loss")] == pytest.approx(ran["evaluations"])
    assert {"train/tokens_per_s", "train/tflops_per_gpu", "phases/forward_s"} <= set(board.Tags()["scalars"])


def test_a_run_is_drawn(ran: dict[str, Any], folder: Path) -> None:
    pytest.importorskip("matplotlib")
    assert ran["is_complete"]
    said = CliRunner().invoke(app, ["plots", str(folder / "events.jsonl"), str(folder / "run.png")])
    assert said.exit_code == 0, said.output
    assert "4 steps, 2 evaluations, 0 versions" in said.output
    picture = (folder / "run.png").read_bytes()
    assert picture.startswith(PNG) and len(picture) > 10_000


def test_broken_events_are_named(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    step = json.dumps({"event": "step", "step": 1, "loss": 2.0})
    events.write_text(f"{step}\n{step[:9]}\n{step}\n")
    with pytest.raises(ConfigError, match="line 2 is no JSON"):
        read_run(events)
    events.write_text(f"{step}\n{step[:9]}")  # a run that is writing it now
    assert len(read_run(events).steps) == 1
    events.write_text("")
    with pytest.raises(ConfigError, match="tells of no step"):
        read_run(events)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_run(tmp_path / "none")


def test_the_bar_is_for_terminals_and_tells_of_steps() -> None:
    config, text = ConfigContainer(), io.StringIO()
    assert not is_wanted(config, Console(file=text))
    console = Console(file=text, force_terminal=True, width=150)
    assert is_wanted(config, console)
    with ProgressBar(config, console) as bar:
        state: Any = SimpleNamespace(step=3, consumed_samples=24)
        bar.on_train_start(state)
        bar.on_eval_end(state, EvalReport(step=3, loss=2.25, num_tokens=1, eval_s=0.1))
        bar.on_step_end(state, StepReport(step=4, loss=2.5, grad_norm=1.0, lr=0.1, step_s=0.1, tokens_per_s=1234.0))
    assert "4/10" in text.getvalue()
    assert "loss 2.5000  grad norm 1.000  1,234 tokens/s  validation 2.2500" in text.getvalue()


def test_the_bar_counts_samples_so_that_the_time_left_holds_in_a_ramp_up() -> None:
    config = load_config([*RAMP, *SAMPLES])
    text = io.StringIO()
    with ProgressBar(config, Console(file=text, force_terminal=True, width=150)) as bar:
        state: Any = SimpleNamespace(step=5, consumed_samples=12)
        bar.on_train_start(state)
        (task,) = bar._progress.tasks
        assert (task.completed, task.total) == (12, 38)
        report = StepReport(step=6, loss=2.5, grad_norm=1.0, lr=0.1, step_s=0.1, consumed_samples=16)
        bar.on_step_end(state, report)
        assert task.completed == 16
    assert "6/9" in text.getvalue()


def test_what_is_no_number_goes_to_no_sink() -> None:
    nan = float("nan")
    figures = step_figures(StepReport(step=1, loss=nan, grad_norm=nan, lr=0.1, step_s=0.1, skipped="NaN"))
    assert "train/loss" not in figures
    assert figures["train/skipped"] == 1.0


@pytest.mark.long
def test_wandb_has_a_run(qwen3: Path, texts: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    words = [
        *words_for(qwen3, texts, tmp_path / "cache"),
        "logger.wandb_project=p",
        f"logger.wandb_save_dir={tmp_path}",
    ]
    (result,) = run_ranks(train_watched, 1, {"run": {"words": words}}, env={"WANDB_MODE": "offline"})
    assert len(result["run"]["loss"]) == 4
    (run,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert b"train/loss" in run.read_bytes()


@pytest.mark.long
def test_mlflow_has_a_run(qwen3: Path, texts: list[Path], tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path / 'runs.db'}"
    words = [*words_for(qwen3, texts, tmp_path / "cache"), "logger.mlflow_experiment=e"]
    (result,) = run_ranks(train_watched, 1, {"run": {"words": [*words, f"logger.mlflow_tracking_uri={uri}"]}})
    mlflow.set_tracking_uri(uri)
    (run,) = mlflow.search_runs(experiment_names=["e"], output_format="list")
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "train/loss")
    assert [point.value for point in history] == pytest.approx(result["run"]["loss"])
