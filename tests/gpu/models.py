"""Checks of bridges: the runtime's stand-ins, and models built, filled and run on the device."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests.bridges import parity_models
from tests.bridges.tiny_mla import make_mla_model
from tests.gpu.table import Scale, require
from transformers import AutoModelForCausalLM, PretrainedConfig

from weightcast.bridges import AutoBridge
from weightcast.bridges.cuda_stand_ins import CudaToCpuMode
from weightcast.bridges.process_groups import destroy_distributed
from weightcast.bridges.runtime import MENDS, ensure_runtime

VOCABULARY = parity_models.COMMON["vocab_size"]
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": parity_models.MODELS["llama3-tied-one-kv-head"],
    "qwen3": parity_models.MODELS["qwen3-biases-windows"],
    "qwen3-moe": parity_models.MOE_MODELS["qwen3-moe-biases-one-dense-layer"],
}
# Multi-head latent attention, experts in groups, a shared expert.
MLA = "deepseek-v3"
MISSING = object()
# Megatron and transformers add in another order, and a GPU's kernels in a third. Logits are some units large; with
# TF32 they are a hundred times farther apart.
TOLERANCE = {"cpu": 2e-5, "cuda": 1e-4}


def check_runtime(scale: Scale) -> dict[str, Any]:
    """With CUDA nothing of torch's may be replaced; without, everything that the table says."""
    before = {mend.target: _find(mend.target) for mend in MENDS}
    ensure_runtime()
    changed = {target for target, value in before.items() if _find(target) is not value}
    needed = {mend.target for mend in MENDS if mend.needed()}
    stack: Any = torch.overrides
    modes = [type(mode).__name__ for mode in stack._get_current_function_mode_stack()]
    # A release of Megatron may have of itself what is put there.
    as_it_was = {
        mend.target for mend in MENDS if mend.needed() and mend.make(before[mend.target]) is before[mend.target]
    }
    require(changed == needed - as_it_was, f"replaced are {sorted(changed)}, needed here {sorted(needed - as_it_was)}")
    if scale.device == "cuda":
        of_torch = sorted(target for target in changed if target.startswith("torch"))
        require(not of_torch, f"replaced although there is CUDA: {of_torch}")
        require(not modes, f"calls for CUDA are sent elsewhere although there is one: {modes}")
    else:
        require(CudaToCpuMode.__name__ in modes, f"the modes are {modes}")
    made = torch.zeros(1, device="cuda").device.type
    require(made == scale.device, f"a tensor for CUDA is on {made}")
    return {"looked_at": len(MENDS), "replaced": sorted(changed) if scale.device == "cuda" else len(changed)}


def _find(target: str) -> Any:
    """The present value of a mend's target, or that it has none."""
    module, path = target.split(":")
    value: Any = importlib.import_module(module)
    for name in path.split("."):
        value = getattr(value, name, MISSING)
    return value


def write_model(name: str, folder: Path) -> Path:
    """A random checkpoint of the family in fp32, whose norms and biases are no constants."""
    torch.manual_seed(len(name))
    if name == MLA:
        make_mla_model(name).save_pretrained(folder)
        return folder
    model = AutoModelForCausalLM.from_config(FAMILIES[name](), dtype=torch.float32)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.ndim == 1:
                tensor.add_(torch.randn_like(tensor) * 0.3)
    model.save_pretrained(folder)
    return folder


def check_parity(scale: Scale) -> dict[str, Any]:
    """Each family's largest difference of a logit; and that what is exported has the bits of the checkpoint."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    figures: dict[str, Any] = {}
    for name in (*FAMILIES, MLA):
        folder = write_model(name, scale.folder / name)
        figures[name] = _compare(folder, scale)
    destroy_distributed()
    worst = max(figures.values())
    require(worst <= TOLERANCE[scale.device], f"logits differ by up to {worst:g}: {figures}")
    return figures | {"tolerance": TOLERANCE[scale.device]}


def _compare(folder: Path, scale: Scale) -> float:
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, VOCABULARY, (4, 24), generator=generator).to(scale.device)
    bridge = AutoBridge.from_hf_pretrained(folder)
    (model,) = bridge.to_megatron_model(wrap_with_ddp=False)
    places = {parameter.device.type for parameter in model.parameters()}
    require(places == {scale.device}, f"the model of {folder.name} was built on {places}")
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(scale.device)
    with torch.no_grad():
        found = model.eval()(tokens, torch.arange(24, device=scale.device).expand_as(tokens), None)[..., :VOCABULARY]
        expected = reference(tokens).logits
    check_round_trip(bridge, model)
    return float((found - expected).abs().max())


def check_round_trip(bridge: AutoBridge, model: Any) -> None:
    """Every tensor of the checkpoint, exported, has its bits."""
    checkpoint = bridge.hf_checkpoint()
    exported = dict(bridge.export_hf_weights([model], cpu=True))
    names = [spec.name for spec in checkpoint.specs]
    require(list(exported) == names, f"exported are {sorted(set(exported) ^ set(names))} too many or too few")
    with checkpoint.reader() as reader:
        for spec in checkpoint.specs:
            stored = reader.read(spec.whole())
            same = torch.equal(stored.view(-1).view(torch.uint8), exported[spec.name].view(-1).view(torch.uint8))
            require(same, f"{spec.name} came out with other bits than it went in")
