"""What vLLM's own reload leaves undone on a CPU, where a version is loaded in the pause."""

from collections.abc import Iterable

import torch


def refresh_tied_layers(model: torch.nn.Module) -> None:
    """Let layers that share their weight with another one process it anew.

    On a CPU an output layer keeps a packed copy of its weight (vLLM 0.32, layers/utils.py,
    `dispatch_cpu_unquantized_gemm`). The reload processes only layers that were given tensors, and a tied output
    layer is given none: without this it goes on with the old embedding, and nothing says so.
    """
    sharing: dict[int, list[torch.nn.Module]] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.numel() > 0:
            sharing.setdefault(id(weight), []).append(module)
    for modules in sharing.values():
        for module in modules if len(modules) > 1 else ():
            method = getattr(module, "quant_method", None)
            if method is not None:
                method.process_weights_after_loading(module)


def own_weights(model: torch.nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """Copy what a model's loader kept of the tensors that it was given, instead of copying it; the names.

    What several workers read is overwritten by the next version, and an engine must not serve out of it.
    """
    staged = {tensor.untyped_storage().data_ptr() for _, tensor in tensors if tensor.numel()}
    kept = []
    for name, held in (*model.named_parameters(), *model.named_buffers()):
        if held.numel() and held.device.type == "cpu" and held.untyped_storage().data_ptr() in staged:
            held.data = held.data.clone()
            kept.append(name)
    return kept
