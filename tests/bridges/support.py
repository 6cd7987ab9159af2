"""Writes `bridges/SUPPORT.md` from the numbers of a parity run: the largest difference by family and layout.

`WEIGHTCAST_SUPPORT_PAGE=1 pytest tests/bridges/test_parity.py` runs the parity job and writes the page; without the
variable the test only checks that the page names every family and layout that the job covers.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

PAGE = Path(__file__).parents[2] / "bridges" / "SUPPORT.md"
FAMILIES: Mapping[str, str] = {
    "llama": "Llama 2, 3, 3.1, 3.2, 3.3",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "gemma3": "Gemma 3 (text)",
    "qwen3-moe": "Qwen3-MoE",
    "mixtral": "Mixtral",
    "qwen2-moe": "Qwen2-MoE",
    "glm4-moe": "GLM-4.5",
}
_GRADIENTS, _MOE = "gradients-", "moe-"
_HEAD = """# What was compared with transformers

Random small models with every feature on, in fp32 on a CPU: four gloo processes, megatron-core's local layers, against
`transformers`. Written by the test run that `tests/bridges/support.py` describes. Logits are allowed 1e-5, with experts
2e-5; the loss's difference, and a gradient's in relation to the largest of its tensor, 1e-4. Import followed by export
gives back every bit in the layouts that `tests/bridges/test_bits.py` lists. Families that are not here have tests of
their own.

| family | logits, at most | gradients, at most | layouts (those with * also for gradients) |
|---|---|---|---|
"""


def family_of(model: str) -> str:
    """The key in `FAMILIES` of a model of the parity job: the longest that its name starts with."""
    prefixes = [key for key in FAMILIES if model == key or model.startswith((f"{key}-", f"{key}2", f"{key}3"))]
    return max(prefixes, key=len)


def support_page(differences: Mapping[str, Mapping[str, float]]) -> str:
    """The page for the job's `differences`, by layout and model."""
    logits: dict[str, dict[str, float]] = defaultdict(dict)
    gradients: dict[str, dict[str, float]] = defaultdict(dict)
    for layout, by_model in differences.items():
        if layout == "sabotage":
            continue
        name = layout.removeprefix(_MOE)
        table = gradients if name.startswith(_GRADIENTS) else logits
        name = name.removeprefix(_GRADIENTS)
        for model, difference in by_model.items():
            row = table[family_of(model)]
            row[name] = max(difference, row.get(name, 0.0))
    rows = [
        f"| {title} | {max(logits[key].values()):.1e} | {max(gradients[key].values()):.1e} | "
        f"{', '.join(name + '*' * (name in gradients[key]) for name in logits[key])} |"
        for key, title in FAMILIES.items()
    ]
    return _HEAD + "\n".join(rows) + "\n"


def without_numbers(page: str) -> list[list[str]]:
    """What must be the same from run to run: of each row the family and the layouts."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    return [[row[0], row[3]] for row in cells]
