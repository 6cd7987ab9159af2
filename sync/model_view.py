"""What an engine knows of the model that its publisher publishes: tensors, epoch, and who serves what. Pure."""

from collections.abc import Mapping, Sequence

import torch

from weightcast.sync.errors import ModelMismatch, WireError
from weightcast.sync.layout import SourceLayout, read_layout
from weightcast.sync.messages import PROTOCOL, Layout, Welcome
from weightcast.sync.part_plan import PartPlan, list_boxes, list_kept_specs, plan_parts
from weightcast.sync.regions import TensorSpec
from weightcast.sync.version import find_model_differences
from weightcast.sync.wanted import Want, WantedRegions, resolve_want
from weightcast.sync.wanted_tensors import WantedTensors

MAX_DIFFERENCES_SHOWN = 5


class ModelView:
    """Of one engine, whose name is in every error. `expect` lists the tensors that it must get, if it says so."""

    def __init__(self, engine: str, expect: Sequence[TensorSpec] | None) -> None:
        self.specs: tuple[TensorSpec, ...] | None = None
        self.epoch: int | None = None
        self.chunk_bytes = 0
        self.error: ModelMismatch | WireError | None = None
        """Why no version of this publisher can be taken."""
        self.want: Want | None = None
        """Which boxes of the tensors are wanted, where it is not all of them; set before a publisher is met."""
        self.staged_specs: tuple[TensorSpec, ...] | None = None
        """What is staged: the tensors, or one for each wanted box."""
        self._wanted: WantedRegions | None = None
        self._plan: PartPlan | None = None
        self._engine = engine
        self._expect = None if expect is None else tuple(expect)
        self._layout: Layout | None = None
        self._layouts: Mapping[int, SourceLayout] | None = None

    def is_older(self, epoch: int) -> bool:
        """Whether this is the epoch of a forgotten publisher that still runs."""
        return self.epoch is not None and epoch < self.epoch

    def welcome(self, message: Welcome) -> None:
        """Meet a publisher, which is not older than the one before."""
        if message.protocol != PROTOCOL:
            self.error = WireError(
                f"the publisher speaks protocol {message.protocol}, this is {PROTOCOL}; "
                "use the same weightcast on both sides"
            )
            return
        if message.epoch != self.epoch or message.specs != self.specs:
            self._layout = self._layouts = self._plan = None
        self.epoch = message.epoch
        self.specs = self.staged_specs = message.specs
        self.error = self._compare(message.specs)
        if self.error is None and self.want is not None:
            self.error = self._resolve(self.want, message.specs)

    def _resolve(self, want: Want, specs: tuple[TensorSpec, ...]) -> ModelMismatch | None:
        try:
            wanted = resolve_want(want, specs)
        except ModelMismatch as error:
            return ModelMismatch(f"engine {self._engine!r}: {error}")
        if wanted != self._wanted:
            self._wanted, self._plan = wanted, None
        self.staged_specs = list_kept_specs(specs, wanted)
        return None

    def _compare(self, specs: tuple[TensorSpec, ...]) -> ModelMismatch | None:
        if self._expect is None:
            return None
        lines = find_model_differences(self._expect, specs)
        if not lines:
            return None
        more = f"; and {len(lines) - MAX_DIFFERENCES_SHOWN} more" if len(lines) > MAX_DIFFERENCES_SHOWN else ""
        return ModelMismatch(
            f"engine {self._engine!r} and the publisher have different models: "
            f"{'; '.join(lines[:MAX_DIFFERENCES_SHOWN])}{more}. Start the engine on a checkpoint of the model "
            "that is being trained, or give it the right publisher's address"
        )

    def lay_out(self, message: Layout) -> None:
        """Learn who serves what, of the publisher that was met last."""
        if message.epoch != self.epoch or self.specs is None or message == self._layout:
            return
        self._layout, self._layouts, self._plan = message, None, None
        self.chunk_bytes = message.chunk_bytes

    @property
    def num_sources(self) -> int:
        """How many sources the publisher has."""
        return 0 if self._layout is None else len(self._layout.offers)

    @property
    def layouts(self) -> Mapping[int, SourceLayout]:
        """Every source's layout. Raises `WireError` when the publisher has given none, or one that cannot be."""
        if self._layouts is None:
            if self._layout is None or self.specs is None:
                raise WireError(f"the publisher announced a version to engine {self._engine!r} before its layout")
            self._layouts = read_layout(self._layout, self.specs)
        return self._layouts

    @property
    def plan(self) -> PartPlan | None:
        """What is kept of each chunk, where some boxes are wanted. Raises as `layouts`."""
        if self._wanted is not None and self._plan is None:
            assert self.specs is not None
            self._plan = plan_parts(self.layouts, self.specs, self._wanted)
        return self._plan

    def present(self, staged: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """What was staged elsewhere, as an engine takes it."""
        if self._wanted is None:
            return dict(staged)
        assert self.specs is not None
        return WantedTensors(self.specs, list_boxes(self.specs, self._wanted), staged)
