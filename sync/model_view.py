"""What an engine knows of the model that its publisher publishes: tensors, epoch, and who serves what. Pure."""

from collections.abc import Mapping, Sequence
from operator import is_not

import torch

from weightcast.sync.errors import ModelMismatch, WireError
from weightcast.sync.layout import SourceLayout, read_layout
from weightcast.sync.messages import PROTOCOL, Layout, Welcome
from weightcast.sync.part_plan import PartPlan, list_staged_specs, plan_parts
from weightcast.sync.regions import TensorSpec
from weightcast.sync.union_tensors import UnionCuts, plan_cuts
from weightcast.sync.version import find_model_differences
from weightcast.sync.wanted import Want, WantedRegions, resolve_want

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
        self.wanted: WantedRegions | None = None
        """These boxes; None where the engine wants all."""
        self._received: WantedRegions | None = None
        self._plan: PartPlan | None = None
        self._cuts: UnionCuts | None = None
        self._cuts_of: tuple[object, ...] = ()
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
        self.specs = message.specs
        self.error = self._compare(message.specs)
        if self.error is None and self.want is not None:
            self.error = self._resolve(self.want, message.specs)

    def _resolve(self, want: Want, specs: tuple[TensorSpec, ...]) -> ModelMismatch | None:
        try:
            wanted = resolve_want(want, specs)
        except ModelMismatch as error:
            return ModelMismatch(f"engine {self._engine!r}: {error}")
        if wanted != self.wanted:
            self.wanted = wanted
            self.receive(wanted)
        return None

    def receive(self, wanted: WantedRegions | None) -> None:
        """Stage these boxes of versions, or all of them: what others of the host want too, or what this engine does."""
        if wanted is not self._received and wanted != self._received:
            self._received, self._plan = wanted, None

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
        """What is kept of each chunk, where some boxes are received. Raises as `layouts`."""
        if self._plan is None:
            self._plan = self.plan_for(self._received)
        return self._plan

    def plan_for(self, wanted: WantedRegions | None) -> PartPlan | None:
        """The same for these boxes; None for all of the model."""
        if wanted is None:
            return None
        assert self.specs is not None
        return plan_parts(self.layouts, self.specs, wanted)

    @property
    def staged_specs(self) -> tuple[TensorSpec, ...]:
        """What is staged: the tensors, or one for each box."""
        assert self.specs is not None
        return list_staged_specs(self.specs, self._received)

    def present(self, staged: Mapping[str, torch.Tensor], union: WantedRegions | None) -> Mapping[str, torch.Tensor]:
        """What was staged for `union`, boxes of several engines or all of the model, as this one takes it."""
        if self.wanted is None:
            return dict(staged)
        found = (self.specs, self.wanted, union)
        if self._cuts is None or any(map(is_not, found, self._cuts_of)):
            assert self.specs is not None
            self._cuts, self._cuts_of = plan_cuts(self.specs, self.wanted, union), found
        return self._cuts.present(staged)
