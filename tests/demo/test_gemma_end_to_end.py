"""Real weights, a real engine: Gemma 3 270M, trained at TP=2 on real sentences, kept in step in a real vLLM.

Each version goes into the running server; at the end its tokens, greedy and sampled, equal those of a fresh server
on the exported folder. One key/value head on two ranks, tied embeddings, a vocabulary of 262144, sliding windows:
what a tiny random model does not have together.
"""

import io
from pathlib import Path

import pytest
from rich.console import Console

from weightcast.adapters.demo.inputs import DemoRequest
from weightcast.adapters.demo.job import run_demo
from weightcast.adapters.demo.live import LiveTable
from weightcast.adapters.demo.proof import Question

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

STEPS = 3
NUM_BYTES = 536_196_352  # every tensor of the model in bf16, the tied head once

# True sentences of plain English, repeated until a few global batches of 128-token samples are filled.
SENTENCES = """Water boils at one hundred degrees Celsius at sea level, and at a lower temperature on a mountain.
The Moon takes a little more than twenty-seven days to go once around the Earth.
Sound travels through air at about three hundred and forty metres a second, and faster through water.
A leap year has three hundred and sixty-six days; the additional day is the twenty-ninth of February.
Iron rusts when oxygen and water reach its surface; paint keeps both of them away.
The heart of a blue whale beats only a few times a minute while it dives.
Bees tell each other where flowers are by dancing on the comb inside the hive.
Glass is made from sand, soda and lime, melted together at a high temperature.
The Danube flows through more countries than any other river in the world.
Bread rises because yeast turns sugar into carbon dioxide, which the dough holds back.
"""


@pytest.mark.timeout(900)
def test_gemma_in_a_real_vllm(gemma_270m: Path, tmp_path: Path) -> None:
    text = tmp_path / "sentences.txt"
    text.write_text(SENTENCES * 40)
    request = DemoRequest(
        engine="vllm",
        model=str(gemma_270m),
        data=text,
        steps=STEPS,
        tensor_parallel=2,
        out=tmp_path / "out",
    )
    output = io.StringIO()
    with LiveTable(Console(file=output, width=200)) as table:
        result = run_demo(request, table)
    assert result.proof.faults() == ()
    lines = [line.split() for line in output.getvalue().splitlines() if line.split()[:1] == [str(STEPS)]]
    assert lines and lines[0][3:5] == ["yes", f"{NUM_BYTES:,}"]
    before = {each.question: each.before.text for each in result.proof.comparisons}
    assert before[Question("Water boils at a temperature of")].startswith(" 100 degrees Celsius")
