"""sync moves versions of HF-named weights from a trainer into engines: complete, verified, or not at all.

    WeightPublisher(source, address).publish(version)        on every trainer rank
    WeightSubscriber(address).wait(timeout_s)                in every engine-side process

    DiskPublisher(source, folder).publish(version)           the same through a store of versions, with no link between
    DiskSubscriber(folder).wait(timeout_s)                   the two sides: a folder, or an object store

    follow(address).wait(timeout_s)                          either kind of subscriber, by its address

It knows torch, zmq and msgpack; no Megatron, no engine.
"""

from weightcast.sync.cut_source import CutSource, cut_source
from weightcast.sync.disk.materialize import MaterializeReport, materialize
from weightcast.sync.disk.observer import DiskObserver
from weightcast.sync.disk.publisher import DiskPublisher
from weightcast.sync.disk.reports import DiskReport
from weightcast.sync.disk.subscriber import DiskLimits, DiskSubscriber, DiskUpdate
from weightcast.sync.fleet import EngineStatus, FleetPolicy
from weightcast.sync.follow import follow, kind_of
from weightcast.sync.host.share import HostShare
from weightcast.sync.in_place import Held
from weightcast.sync.limits import Limits
from weightcast.sync.publication import Publication
from weightcast.sync.publisher import DeltaMode, WeightPublisher
from weightcast.sync.quantize_rules import Fp8Scheme
from weightcast.sync.quantized_source import QuantizedSource
from weightcast.sync.records import EngineReport, SourceReport, Span
from weightcast.sync.regions import HeldRegion, Region, TensorSpec
from weightcast.sync.report import PublishReport
from weightcast.sync.report_log import ReportLog
from weightcast.sync.source import ModuleSource, WeightSource
from weightcast.sync.subscriber import WeightSubscriber
from weightcast.sync.transports.collective import (
    CollectiveReceiver,
    CollectiveSource,
    broadcast_version,
    receive_version,
)
from weightcast.sync.transports.zmq_sockets import CurveKeys
from weightcast.sync.update import Update, UpdateStats
from weightcast.sync.version import Manifest, Version
from weightcast.sync.wanted import WantedRegions
from weightcast.sync.wanted_tensors import WantedTensors

__all__ = [
    "CollectiveReceiver",
    "CollectiveSource",
    "CurveKeys",
    "CutSource",
    "DeltaMode",
    "DiskLimits",
    "DiskObserver",
    "DiskPublisher",
    "DiskReport",
    "DiskSubscriber",
    "DiskUpdate",
    "EngineReport",
    "EngineStatus",
    "FleetPolicy",
    "Fp8Scheme",
    "Held",
    "HeldRegion",
    "HostShare",
    "Limits",
    "Manifest",
    "MaterializeReport",
    "ModuleSource",
    "Publication",
    "PublishReport",
    "QuantizedSource",
    "Region",
    "ReportLog",
    "SourceReport",
    "Span",
    "TensorSpec",
    "Update",
    "UpdateStats",
    "Version",
    "WantedRegions",
    "WantedTensors",
    "WeightPublisher",
    "WeightSource",
    "WeightSubscriber",
    "broadcast_version",
    "cut_source",
    "follow",
    "kind_of",
    "materialize",
    "receive_version",
]
