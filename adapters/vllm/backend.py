"""The weight-transfer backend `weightcast`, inside each vLLM worker.

vLLM's three calls become: `start_weight_update` waits until a version is staged, complete and verified in local
memory and fits the model; `update_weights` swaps it in where it was prepared beside the weights that serve
(`preparer.py`), or else loads it in one piece; `finish_weight_update` reports it. Stock vLLM
takes an update that lacks tensors, publishes its label and serves nonsense (seen on 0.32: without a `gate_proj` not
even a later full update heals it), so everything that can be refused is refused before its reload begins, and the
reload begins and ends inside one call: a driver that dies between calls leaves an engine with whole weights.

    vllm serve path/to/hf --weight-transfer-config '{"backend": "weightcast"}'

Several workers of one host receive each version once, into memory that all of them load from (`WeightSubscriber`'s
`share`): all of it, or the slices that any of them keeps (`slices.py`). Each reads a store of versions by itself.
What only the server's operator may set is in `settings.py`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from vllm.config import VllmConfig
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.parallel_state import get_node_count
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from weightcast.adapters.engine import check_offer, parse_label, version_label
from weightcast.adapters.keys import read_engine_keys, read_store_key
from weightcast.adapters.timeline import EventLog
from weightcast.adapters.vllm import NOT_CONNECTED, NOT_STAGED, UNTOUCHED
from weightcast.adapters.vllm.preparer import Preparer, make_spare
from weightcast.adapters.vllm.reload import own_weights, refresh_tied_layers
from weightcast.adapters.vllm.settings import check_publisher, choose_share, read_settings
from weightcast.adapters.vllm.slices import check_tied_update, choose_want, staged_tensors
from weightcast.adapters.vllm.spare import CannotSwapError
from weightcast.adapters.vllm.waiting import wait_for_version
from weightcast.sync import DiskSubscriber, DiskUpdate, Span, Update, WeightSubscriber, follow
from weightcast.sync.checkpoint_files import open_checkpoint
from weightcast.sync.errors import ConfigError, EngineError, ModelMismatch, VersionError, WeightcastError
from weightcast.sync.preview import Preview
from weightcast.sync.regions import TensorSpec


@dataclass
class WeightcastInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Body of `init_weight_transfer_engine`: whom to follow, under which name, and how long `start` may wait."""

    publisher: str
    engine: str = "vllm"
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        check_publisher(self.publisher)
        if not isinstance(self.timeout_s, int | float) or self.timeout_s <= 0:
            raise ConfigError(f"timeout_s must be a number of seconds above 0, got {self.timeout_s!r}")


@dataclass
class WeightcastUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Body of `update_weights`: the label of the version to load, or how to end a session without a load.

    With `check` nothing is loaded: the worker only says whether that is the version that it has staged.
    `abandon` is `"keep"` (the staged version stays for the next session) or `"drop"` (it is refused).
    """

    version: str = ""
    abandon: Literal["", "keep", "drop"] = ""
    check: bool = False


class WeightcastTransferEngine(WeightTransferEngine):  # type: ignore[misc]
    """Loads whole versions from this worker's own subscriber. vLLM makes one per worker after the model is loaded."""

    init_info_cls = WeightcastInitInfo
    update_info_cls = WeightcastUpdateInfo
    supports_draft_weight_update = False

    def __init__(
        self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: torch.nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self._specs = open_checkpoint(find_checkpoint(vllm_config.model_config)).specs
        self._aliases = find_ties(vllm_config.model_config, self._specs)
        self._settings = read_settings(vllm_config.additional_config)
        self._log = EventLog("engine", self._settings.events)
        self._subscriber: WeightSubscriber | DiskSubscriber | None = None
        self._preparer: Preparer | None = None
        self._timeout_s = 0.0
        self._staged: Update | DiskUpdate | None = None
        self._loaded: Update | DiskUpdate | None = None
        self._poisoned = ""

    def init_transfer_engine(self, init_info: WeightcastInitInfo) -> None:
        """Begin to follow a publisher or a store, which may come up later. A second call leaves the first one.

        Raises `ConfigError` for a publisher that the operator does not allow, and `AddressError`.
        """
        allowed = self._settings.publisher
        if allowed is not None and init_info.publisher != allowed:
            raise ConfigError(f"this server takes weights from {allowed} only, got {init_info.publisher}")
        self.shutdown()
        num_workers = self.parallel_config.world_size_across_dp
        spare = make_spare(self.vllm_config, self.model, self.device, self._settings.prepare, init_info.publisher)
        subscriber = follow(
            init_info.publisher,
            engine=self._worker_name(init_info.engine),
            # A checkpoint that lists a tied tensor twice matches a publisher of either form: see `check_offer`.
            expect=None if self._aliases.keys() & {spec.name for spec in self._specs} else self._specs,
            keys=read_engine_keys(self._settings.keys),
            key=read_store_key(self._settings.key_file),
            share=choose_share(self._settings, init_info.publisher, init_info.engine, num_workers, get_node_count()),
            want=choose_want(self._settings, init_info.publisher, self.vllm_config, self._specs, self._aliases),
            prepares=spare is not None,
        )
        assert isinstance(subscriber, WeightSubscriber | DiskSubscriber)
        if spare is not None:
            assert isinstance(subscriber, WeightSubscriber)
            mode = self._settings.prepare
            self._preparer = Preparer(subscriber, spare, mode, self._check_fit, self._log).start()
        self._subscriber, self._timeout_s = subscriber, float(init_info.timeout_s)

    def _worker_name(self, engine: str) -> str:
        """Each worker is a receiver of its own; one alone carries the engine's name."""
        parallel = self.parallel_config
        if parallel.world_size_across_dp == 1:
            return engine
        return f"{engine}/{parallel.data_parallel_index * parallel.world_size + parallel.rank}"

    def start_weight_update(self) -> None:
        """Have the newest released version staged and checked. Engine memory is not touched here.

        Raises `EngineError` or the subscriber's own error; the engine serves on.
        """
        if self._poisoned:
            raise EngineError(f"this engine's weights are undefined ({self._poisoned}); restart it")
        if self._subscriber is None:
            raise ModelMismatch(f"{UNTOUCHED}: {NOT_CONNECTED}; post init_weight_transfer_engine first")
        self._loaded = None
        try:
            update = self._staged = self._newest(self._subscriber)
            if not self._is_prepared(update):
                self._check_fit(update)
        except WeightcastError as error:
            self._drop(str(error))
            raise ModelMismatch(f"{UNTOUCHED}: {type(error).__name__}: {error}") from error

    def _check_fit(self, offer: Update | DiskUpdate | Preview) -> None:
        check_offer(self._specs, offer.specs, self._aliases)
        check_tied_update(offer, self._aliases)

    def _is_prepared(self, update: Update | DiskUpdate) -> bool:
        return self._preparer is not None and self._preparer.holds(update.version)

    def _newest(self, subscriber: WeightSubscriber | DiskSubscriber) -> Update | DiskUpdate:
        """The version that an abandoned session left here, unless the fleet has moved on since."""
        held, released = self._staged, subscriber.released
        if held is not None and released is not None and held.version < released:
            self._drop(f"version {released} was released before this one was loaded")
        elif held is not None:
            self._check(held)
        if self._staged is not None:
            return self._staged
        return wait_for_version(subscriber, self._timeout_s)

    def _check(self, held: Update | DiskUpdate) -> bool:
        """Whether the staged copy is what it was; it is dropped when the workers' host has overwritten it."""
        try:
            if not self._is_prepared(held):  # which needs it no more
                held.check()
        except VersionError as error:
            self._drop(str(error))
        return self._staged is not None

    def _drop(self, reason: str) -> None:
        if self._staged is not None:
            if self._preparer is not None:
                self._preparer.forget()
            self._staged.reject(reason)
            self._staged = None

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load the staged version. Overrides the base, which calls `torch.accelerator.synchronize()`: on a
        machine without an accelerator that raises."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: WeightcastUpdateInfo) -> None:
        """Swap in what was prepared; or reload every layer from local memory, in one piece.

        Raises `ModelMismatch` with engine memory untouched, `EngineError` when the load broke off: the engine
        must then be restarted (vLLM cannot reload a model that is half on the meta device).
        """
        update = self._staged
        if update_info.abandon == "drop":
            self._drop("the driver gave this version up")
        if update_info.abandon or update is None:
            raise ModelMismatch(f"{UNTOUCHED}: the session was ended without a load")
        asked = parse_label(update_info.version)
        if update_info.check and asked is not None and update.version < asked:
            self._drop(f"version {asked} is to be loaded instead")
            raise ModelMismatch(f"{UNTOUCHED}: {NOT_STAGED}: the worker had version {update.version}")
        if update_info.version != version_label(update.version):
            raise ModelMismatch(
                f"{UNTOUCHED}: asked for version {update_info.version!r}, the worker has staged "
                f"{version_label(update.version)!r}; start again with that one"
            )
        if not self._check(update):
            raise ModelMismatch(
                f"{UNTOUCHED}: version {update.version} was overwritten before it was loaded; start again"
            )
        if update_info.check:
            return
        try:
            if self._preparer is not None and self._is_prepared(update):
                with self._log.phase("swap", update.version):
                    self._preparer.swap()
            else:
                with self._log.phase("reload", update.version):
                    self._reload(update)
                    update.release()
        except CannotSwapError as error:
            self._drop(str(error))
            raise ModelMismatch(f"{UNTOUCHED}: {error}") from error
        except BaseException as error:
            self._poisoned = f"loading version {update.version} broke off: {error!r}"
            self._drop(self._poisoned)
            raise EngineError(f"this engine's weights are undefined ({self._poisoned}); restart it") from error
        self._staged, self._loaded = None, update

    def _reload(self, update: Update | DiskUpdate) -> None:
        expected = {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)
        loaded = self.model.load_weights((name, tensor) for name, tensor in update if name not in self._aliases)
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            refresh_tied_layers(self.model)
        own_weights(self.model, staged_tensors(update))
        if loaded is None or self.model_config.quantization is not None:
            return  # vLLM itself tracks loaded names only for unquantised models that report them
        if unfilled := sorted(expected - loaded):
            raise EngineError(f"vLLM filled nothing into {', '.join(unfilled)}")

    def finish_weight_update(self) -> None:
        """Report that the loaded version is served; vLLM publishes its label after this.

        Raises `EngineError` when nothing was loaded, so that no label is published without a load.
        """
        if self._loaded is None:
            raise EngineError("finish_weight_update without a load; post start and update_weights first")
        update, self._loaded = self._loaded, None
        stats = update.stats
        self._log.record(update.version, Span("stage", stats.started_at_s, stats.staged_at_s))
        update.commit(spans=self._log.take(update.version))

    def shutdown(self) -> None:
        """Leave the publisher; the engine serves on."""
        self._staged = self._loaded = None
        if self._subscriber is not None:
            self._subscriber.close()
            self._subscriber = None
        if self._preparer is not None:
            self._preparer.close()
            self._preparer = None


def find_checkpoint(model_config: Any) -> Path:
    """The folder with the files that a vLLM model was started on; of a hub's model the copy on this machine."""
    folder = Path(model_config.model)
    if folder.is_dir():
        return folder
    return Path(snapshot_download(model_config.model, revision=model_config.revision, local_files_only=True))


def find_ties(model_config: Any, specs: tuple[TensorSpec, ...]) -> dict[str, str]:
    """`lm_head.weight` → the embedding's name, for models that tie the two."""
    if not getattr(model_config.hf_text_config, "tie_word_embeddings", False):
        return {}
    embeddings = [spec.name for spec in specs if spec.name.endswith("embed_tokens.weight")]
    return {"lm_head.weight": embeddings[0]} if embeddings else {}
