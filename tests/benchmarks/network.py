"""Rate-limited links on one machine: network namespaces joined by veth pairs, `tc tbf` on the senders' ends.

    with star(["1gbit", "1gbit"]) as net:          # two senders, each with a link of its own to one hub
        ...                                        # processes in net.spokes[i].namespace and net.hub

Spoke `i` has the address 10.77.i.1, the hub 10.77.i.2 on that link; the hub forwards between its links, so that the
spokes reach each other. Needs root and iproute2. Everything is removed at the end, also after an error; what a process
that was killed has left is removed by the next one. A process has one star at a time.
"""

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from records import CaseError

# A queue for this long before packets are dropped; a burst of what a link of 2 Gb/s sends in one tick of 4 ms.
_LATENCY = "50ms"
_BURST = "1mb"
# The process that made a namespace is in its name.
_NAME = re.compile(r"wc(\d+)-(?:hub|s\d+)")


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
    _remove_stale()
    tag = f"wc{os.getpid()}"
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
    return [name for name in names if _NAME.fullmatch(name)]


def _remove_stale() -> None:
    for name in list_namespaces():
        match = _NAME.fullmatch(name)
        if match and not Path(f"/proc/{match[1]}").exists():
            _run("ip", "netns", "delete", name)


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
