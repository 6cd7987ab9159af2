"""Cases over links of a limited rate: several sources, and deltas end to end. Network namespaces, so root is needed.

Addresses there are not loopback, so weightcast runs with CurveZMQ keys, as it would between hosts; the baselines speak
plainly.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import zmq
from measure import take_turns
from moves import OURS, model_for, num_bytes
from network import Star, star
from peers import Link
from records import Reading, Settings

RATE = "1gbit"
SPARSE = {"step": "sparse", "density": 0.008}


def measure_sources(settings: Settings) -> Reading:
    """GB/s of a version from two sources with a link each, against one source with one link."""
    model = model_for(settings)
    with star([RATE, RATE]) as net, _publish(net, model, {}, sources=2) as two, _publish(net, model, {}) as one:
        contestants = {"two": lambda: two.move().seconds, "one": lambda: one.move().seconds}
        times_s = take_turns(contestants, settings.rounds)
    gbps = {name: [num_bytes(model) / 1e9 / s for s in values] for name, values in times_s.items()}
    return Reading(gbps["two"], gbps["one"], "GB/s", f"each link of {RATE}/s, each source holds the whole model")


def measure_delta(settings: Settings) -> Reading:
    """Seconds of a publish that sends deltas against one that sends all, over one link, staged and verified."""
    model = model_for(settings)
    received: list[float] = []
    with (
        star([RATE]) as net,
        _publish(net, model, {"delta": "on"}, SPARSE) as delta,
        _publish(net, model, {"delta": "off"}, SPARSE) as dense,
    ):
        contestants = {"delta": lambda: delta.move().seconds, "dense": lambda: dense.move().seconds}
        times_s = take_turns(contestants, settings.rounds)
        received.append(float(delta.last.senders[0]["num_bytes"]))
    details = {"received_bytes": received[0], "dense_bytes": float(num_bytes(model))}
    note = f"{RATE}/s, 0.8 % changed, {received[0] / 1e6:.1f} MB received"
    return Reading(times_s["delta"], times_s["dense"], "s", note, details)


def race_codec(settings: Settings, *, baseline: str) -> Reading:
    """Our delta publish, verified, against a delta codec of others over a raw socket, on one link, 0.8 % changed."""
    model = model_for(settings)
    with ExitStack() as stack:
        net = stack.enter_context(star([RATE]))
        spoke = net.spokes[0]
        ours = stack.enter_context(_publish(net, model, {"delta": "on"}, SPARSE))
        theirs = stack.enter_context(
            Link(
                baseline,
                model,
                SPARSE,
                {"host": spoke.address},
                sender_namespaces=[spoke.namespace],
                receiver_namespaces=[net.hub],
            )
        )
        contestants = {"ours": lambda: ours.move().seconds, "theirs": lambda: theirs.move().seconds}
        times_s = take_turns(contestants, settings.rounds)
        sizes = [float(link.last.senders[0]["num_bytes"]) for link in (ours, theirs)]
    note = f"{RATE}/s, 0.8 % changed; {sizes[0] / 1e6:.1f} MB against {sizes[1] / 1e6:.1f} MB"
    details = {"received_bytes": sizes[0], "baseline_received_bytes": sizes[1]}
    return Reading(times_s["ours"], times_s["theirs"], "s", note, details)


def _publish(
    net: Star, model: str, options: Mapping[str, Any], state: Mapping[str, Any] | None = None, sources: int = 1
) -> Link:
    """A link of weightcast's from the first spokes to the hub."""
    keys = [key.decode() for key in (*zmq.curve_keypair(), *zmq.curve_keypair())]
    spokes = net.spokes[:sources]
    return Link(
        OURS,
        model,
        state or {},
        {"keys": keys, "transport": "zmq", **options},
        sender_options=[{"address": f"tcp://{spokes[0].address}:0"}, *({} for _ in spokes[1:])],
        sender_namespaces=[spoke.namespace for spoke in spokes],
        receiver_namespaces=[net.hub],
    )
