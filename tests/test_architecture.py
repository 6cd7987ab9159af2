"""What may know what: the arrows between the four rooms, held by reading every file's syntax tree."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("sync", "bridges", "trainer", "adapters")
ALLOWED = {
    "sync": {"sync"},
    "bridges": {"bridges", "sync"},
    "trainer": {"trainer", "bridges", "sync"},
    "adapters": {"adapters", "sync"},
}
# Each engine's package is imported in that engine's own folder. The demo makes a transformers checkpoint.
HOMES = {
    "megatron": ("bridges/", "trainer/"),
    "vllm": ("adapters/vllm/",),
    "sglang": ("adapters/sglang/",),
    "transformers": ("bridges/", "trainer/", "adapters/transformers/", "adapters/demo/embedded_model.py"),
}
PICKLERS = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
# Functions that pickle behind a plain name, in torch, torch.distributed, pyzmq.
PICKLING_CALLS = {
    "torch.load",
    "torch.save",
    "send_pyobj",
    "recv_pyobj",
    "all_gather_object",
    "gather_object",
    "broadcast_object_list",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
}
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60

FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py")) + sorted(
    (ROOT / "src" / "weightcast").glob("*.py")
)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports_of(tree: ast.Module) -> Iterator[str]:
    """The dotted names of all modules that a file imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def test_there_are_files_to_check() -> None:
    assert {name_of(path).split("/")[0] for path in FILES} == {*ROOMS, "src"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_follow_the_arrows(path: Path) -> None:
    room, name = name_of(path).split("/")[0], name_of(path)
    for module in imports_of(parse(path)):
        top, _, rest = module.partition(".")
        assert top not in ROOMS, f"{module} must be imported as weightcast.{module}"
        if top == "weightcast" and room in ALLOWED and rest.split(".")[0] in ROOMS:
            assert rest.split(".")[0] in ALLOWED[room], f"{room} must not import {module}"
        if top in HOMES:
            assert name.startswith(HOMES[top]), f"{module} is imported only under {', '.join(HOMES[top])}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_pickles(path: Path) -> None:
    tree = parse(path)
    assert not {module.split(".")[0] for module in imports_of(tree)} & PICKLERS
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not {name for name in called if name in PICKLING_CALLS or name.split(".")[-1] in PICKLING_CALLS}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_are_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    functions = (node for node in ast.walk(parse(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    long = [node.name for node in functions if (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION_LINES]
    assert not long


# Run in a fresh interpreter: what did importing one room change, and what did it bring along?
PROBE = """
import json, logging, os, signal, sys, threading
import torch, random
def state():
    return {
        # torch names its compiler's cache folder in the environment when Megatron makes it load the compiler.
        "environment": {key: value for key, value in os.environ.items() if not key.startswith("TORCHINDUCTOR_")},
        "cwd": os.getcwd(), "threads": threading.active_count(),
        "handlers": len(logging.getLogger().handlers), "sigterm": str(signal.getsignal(signal.SIGTERM)),
        "sigint": str(signal.getsignal(signal.SIGINT)), "random": hash(random.getstate()),
        "torch_random": torch.initial_seed(), "dtype": str(torch.get_default_dtype()),
        "torch_threads": torch.get_num_threads(), "groups": torch.distributed.is_initialized(),
    }
before = state()
__import__("weightcast." + sys.argv[1])
after = state()
print(json.dumps({"changed": [key for key in before if before[key] != after[key]], "modules": sorted(sys.modules)}))
"""
BROUGHT_ALONG = {
    "sync": set(),
    "bridges": {"megatron", "transformers"},
    "trainer": {"megatron", "transformers"},
    "adapters": set(),
}


@pytest.mark.parametrize("room", ROOMS)
def test_importing_a_room_changes_nothing(room: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROBE, room], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *said, answer = done.stdout.splitlines()
    assert said == []
    found = json.loads(answer)
    assert found["changed"] == []
    tops = {module.split(".")[0] for module in found["modules"]}
    assert not tops & set(ROOMS), "the root's folders must not be importable by their short names"
    assert tops & {"megatron", "transformers", "vllm", "sglang"} <= BROUGHT_ALONG[room]
