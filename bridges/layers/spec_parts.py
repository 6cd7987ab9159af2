"""Parts of a layer's spec that megatron-core writes in two ways, read and replaced alike.

Up to 0.16 an MLP is a `ModuleSpec`; later versions give a `functools.partial` of what builds it, with the same
submodules among its keywords.

    mlp = with_parts(mlp, submodules=replace(submodules_of(mlp), linear_fc1=wider))
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from megatron.core.transformer import ModuleSpec


def submodules_of(spec: ModuleSpec | partial[Any]) -> Any:
    """The record of submodules that `spec` builds from."""
    return spec.keywords["submodules"] if isinstance(spec, partial) else spec.submodules


def with_parts(
    spec: ModuleSpec | partial[Any],
    *,
    module: Callable[..., Any] | None = None,
    submodules: Any = None,
    params: Mapping[str, Any] | None = None,
) -> Any:
    """`spec` with another module, other submodules, or more arguments for its constructor; `None` keeps what it has."""
    added = dict(params or {})
    if isinstance(spec, partial):
        if submodules is not None:
            added["submodules"] = submodules
        return partial(spec.func if module is None else module, *spec.args, **(spec.keywords | added))
    return replace(
        spec,
        module=spec.module if module is None else module,
        params=spec.params | added,
        submodules=spec.submodules if submodules is None else submodules,
    )
