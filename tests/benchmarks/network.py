"""Rate-limited links on one machine: network namespaces joined by veth pairs, `tc tbf` on the senders' ends.

    with star(["1gbit", "1gbit"]) as net:          # two senders, each with a link of its own to one hub
        ...                                        # processes in net.spokes[i].namespace and net.hub

Spoke `i` has the address 10.77.i.1, the hub 10.77.i.2 on that link; the hub forwards between its links, so that the
spokes reach each other. Needs root and iproute2. Everything is removed at the end, also after an error.
"""

import os
import secrets
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from records import CaseError

# A queue for this long before packets are dropped; a burst of what a link of 2 Gb/s sends in one tick of 4 ms.
_LATENCY = "50ms"
_BURST = "1mb"


@dataclass(frozen=True, slots=True)
class Spoke:
    """A sender's end of a link."""

    namespace: str
    address: str


@dataclass(frozen=True, slots=True)
class Star:
    """The hub is where the receiver runs."""

    hub: str
    hub_address: str
    spokes: tuple[Spoke, ...]


@contextmanager
def star(rates: Sequence[str]) -> Iterator[Star]:
    """One link a rate (in tc's words, such as `1gbit`), limited from the spoke to the hub."""
    tag = f"wc{secrets.token_hex(3)}"
    hub = f"{tag}-hub"
    with ExitStack() as stack:
        _make_namespace(stack, hub)
        _run("ip", "netns", "exec", hub, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        spokes = []
        for index, rate in enumerate(rates):
            namespace = f"{tag}-s{index}"
            _make_namespace(stack, namespace)
            _join(namespace, hub, index, rate, tag)
            spokes.append(Spoke(namespace, f"10.77.{index}.1"))
        yield Star(hub, "10.77.0.2", tuple(spokes))


def list_namespaces() -> list[str]:
    """The names of those that a star made and has not removed."""
    names = [line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line]
    return [name for name in names if name.startswith("wc") and "-" in name]


def _make_namespace(stack: ExitStack, name: str) -> None:
    _run("ip", "netns", "add", name)
    # The veth pairs go with their namespaces.
    stack.callback(_run, "ip", "netns", "delete", name)
    _run("ip", "-n", name, "link", "set", "lo", "up")


def _join(namespace: str, hub: str, index: int, rate: str, tag: str) -> None:
    outer, inner = f"{tag}a{index}", f"{tag}b{index}"
    _run("ip", "link", "add", outer, "netns", namespace, "type", "veth", "peer", "name", inner, "netns", hub)
    for place, device, end in ((namespace, outer, 1), (hub, inner, 2)):
        _run("ip", "-n", place, "address", "add", f"10.77.{index}.{end}/24", "dev", device)
        _run("ip", "-n", place, "link", "set", device, "up")
    _run("ip", "-n", namespace, "route", "add", "default", "via", f"10.77.{index}.2")
    limit = ("tbf", "rate", rate, "burst", _BURST, "latency", _LATENCY)
    _run("tc", "-n", namespace, "qdisc", "add", "dev", outer, "root", *limit)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
    if done.returncode:
        raise CaseError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
