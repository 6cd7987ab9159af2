"""sync moves versions of HF-named weights from a trainer into engines: complete, verified, or not at all.

    WeightPublisher(source, address).publish(version)        on every trainer rank
    WeightSubscriber(address).wait(timeout_s)                in every engine-side process

It knows torch, zmq and msgpack; no Megatron, no engine.
"""

from weightcast.sync.arrival import Limits
from weightcast.sync.fleet import EngineStatus, FleetPolicy
from weightcast.sync.messages import EngineReport, Span
from weightcast.sync.publisher import PublishReport, WeightPublisher
from weightcast.sync.regions import HeldRegion, Region, TensorSpec
from weightcast.sync.source import ModuleSource, WeightSource
from weightcast.sync.subscriber import Update, UpdateStats, WeightSubscriber
from weightcast.sync.transports.collective import (
    CollectiveReceiver,
    CollectiveSource,
    broadcast_version,
    receive_version,
)
from weightcast.sync.transports.zmq_sockets import CurveKeys
from weightcast.sync.version import Manifest, Version

__all__ = [
    "CollectiveReceiver",
    "CollectiveSource",
    "CurveKeys",
    "EngineReport",
    "EngineStatus",
    "FleetPolicy",
    "HeldRegion",
    "Limits",
    "Manifest",
    "ModuleSource",
    "PublishReport",
    "Region",
    "Span",
    "TensorSpec",
    "Update",
    "UpdateStats",
    "Version",
    "WeightPublisher",
    "WeightSource",
    "WeightSubscriber",
    "broadcast_version",
    "receive_version",
]
