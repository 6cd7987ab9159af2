"""Folders under a model type that only code of their own reads: converted where it is trusted, and else nothing runs.

The code makes a configuration; the architecture's name says which class of transformers has its fields.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.bridges.test_api import equal, stored, write_copy
from tests.ranks import run_ranks
from transformers import AutoConfig, AutoModelForCausalLM

CUSTOM_CODE = """
import os
from transformers import LlamaConfig, PretrainedConfig

os.environ["CUSTOM_CODE_RAN"] = "1"

class FooConfig({base}):
    model_type = "foo"
    attribute_map = {{"hidden_size": "width"}}
"""


def write_custom(source: Path, folder: Path, base: str, auto_map: dict[str, str]) -> Path:
    """A copy of a Llama folder under a type of its own, one of whose fields has a name of its own too."""
    write_copy(source, folder, stored(source))
    fields = json.loads((folder / "config.json").read_text())
    fields |= {"model_type": "foo", "width": fields.pop("hidden_size"), "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "configuration_foo.py").write_text(CUSTOM_CODE.format(base=base))
    return folder


def trust(models: str, out: str, base: str) -> dict[str, Any]:
    """A folder with code of its own for its configuration: not trusted, trusted, and without the code."""
    from transformers import dynamic_module_utils

    from weightcast.bridges import AutoBridge
    from weightcast.sync.errors import ConfigError

    dynamic_module_utils.HF_MODULES_CACHE = str(Path(out, "modules"))
    source = Path(models, "llama3.2")
    auto_map = {"AutoConfig": "configuration_foo.FooConfig", "AutoModelForCausalLM": "modeling_foo.LlamaForCausalLM"}
    folder = write_custom(source, Path(out, "custom"), base, auto_map)

    def message(call: Callable[[], Any]) -> str:
        try:
            call()
        except (ConfigError, OSError) as error:
            return f"{type(error).__name__}: {error}"
        return "not refused"

    handled = [AutoBridge.can_handle(folder), AutoBridge.can_handle(str(folder), trust_remote_code=False)]
    refused = message(lambda: AutoBridge.from_hf_pretrained(folder))
    ran = [os.environ.get("CUSTOM_CODE_RAN")]
    handled.append(AutoBridge.can_handle(folder, trust_remote_code=True))
    ran.append(os.environ.get("CUSTOM_CODE_RAN"))
    bridge = AutoBridge.from_hf_pretrained(folder, trust_remote_code=True)
    model = bridge.to_megatron_model(wrap_with_ddp=False)
    bridge.save_hf_pretrained(model, Path(out, "saved"), show_progress=False)
    of_config = AutoBridge.from_hf_config(AutoConfig.from_pretrained(folder, trust_remote_code=True))
    of_config.save_hf_pretrained(model, Path(out, "native"), show_progress=False)
    (folder / "configuration_foo.py").unlink()
    return {
        "handled": handled,
        "refused": refused,
        "ran": ran,
        "type": type(bridge.hf_config).__name__,
        "same": equal(dict(bridge.export_hf_weights(model)), stored(source)),
        "without code": message(lambda: AutoBridge.from_hf_pretrained(folder, trust_remote_code=True)),
    }


@pytest.mark.parametrize("base", ["LlamaConfig", "PretrainedConfig"])
def test_code_of_a_folder_runs_only_where_it_is_trusted(base: str, tiny_models: Path, tmp_path: Path) -> None:
    (said,) = run_ranks(trust, 1, str(tiny_models), str(tmp_path), base, process_group=False)
    refused, without_code = said.pop("refused"), said.pop("without code")
    assert "that comes with it (configuration_foo.FooConfig), and that code is not trusted" in refused
    assert refused.startswith("ConfigError") and "pass trust_remote_code=True" in refused
    assert "configuration_foo.py" in without_code
    assert said == {
        "handled": [False, False, True],
        "ran": [None, "1"],
        "type": "LlamaConfig",
        "same": True,
    }
    assert (tmp_path / "saved" / "configuration_foo.py").is_file()
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "foo"
    # Written from the configuration alone it is a Llama folder, which needs no code.
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "native").state_dict()
    source = AutoModelForCausalLM.from_pretrained(tiny_models / "llama3.2").state_dict()
    assert equal(theirs, source)
