"""What the processes of a demo say of themselves: JSON lines in event files, read while they grow.

Two kinds of line matter: a phase (this process did this for that version, from then till then) and a version
(step, loss, and what it took to get it into the engine). Wall clocks of one host agree, so the phases of several
processes fit on one axis.

    reader = EventReader(Path("out/events"))
    for event in reader.read_new():
        ...
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightcast.sync.errors import ConfigError

REPORTING_RANK = "trainer-0"  # every rank reports a version, all alike
HEADINGS = (
    "version",
    "step",
    "loss",
    "served",
    "bytes sent",
    "seconds to stage",
    "engine pause, ms",
    "checksums checked",
)


@dataclass(frozen=True, slots=True)
class Phase:
    """One process at work on one version; `start_s` and `end_s` are seconds since 1970, equal for a moment."""

    process: str
    name: str
    version: int
    start_s: float
    end_s: float
    reason: str = ""  # why an engine refused a version

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True)
class VersionRow:
    """One line of the table: what version `version`, made by training step `step`, took to be served."""

    version: int
    step: int
    loss: float
    num_bytes: int
    stage_s: float
    pause_ms: float
    checksums_checked: int
    served: bool  # at least one engine said so, and none said otherwise

    def cells(self) -> tuple[str, ...]:
        """The row as it is shown, in the order of `HEADINGS`."""
        return (
            str(self.version),
            str(self.step),
            f"{self.loss:.4f}",
            "yes" if self.served else "NO",
            f"{self.num_bytes:,}",
            f"{self.stage_s:.3f}",
            f"{self.pause_ms:.1f}",
            f"{self.checksums_checked:,}",
        )


Event = Phase | VersionRow


class EventReader:
    """Reads the event files of a folder while other processes append to them; files may come later."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._offsets: dict[Path, int] = {}

    def read_new(self) -> list[Event]:
        """The events of all lines finished since the last call. Raises ConfigError on a line that is not one."""
        return [event for path in sorted(self._folder.glob("*.jsonl*")) for event in self._read_file(path)]

    def _read_file(self, path: Path) -> list[Event]:
        with path.open("rb") as file:
            file.seek(self._offsets.get(path, 0))
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]  # the last line may still be in the making
        self._offsets[path] = self._offsets.get(path, 0) + len(whole)
        events = (parse_event(line) for line in whole.decode().splitlines() if line.strip())
        return [event for event in events if event is not None]


def parse_event(line: str) -> Event | None:
    """The event of one JSON line; None for kinds that neither table nor timeline shows."""
    try:
        fields = json.loads(line)
        if fields.get("event") == "version":
            return _parse_version(fields) if fields["process"] == REPORTING_RANK else None
        if "phase" in fields:
            phase = Phase(
                process=str(fields["process"]),
                name=str(fields["phase"]),
                version=int(fields.get("version") or 0),
                start_s=float(fields["start_s"]),
                end_s=float(fields["end_s"]),
                reason=str(fields.get("reason", "")),
            )
            # A moment without a reason ("it serves") is the end of another phase, and would be drawn twice.
            return phase if phase.duration_s > 0 or phase.reason else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"an event file holds a line that is no event ({error!r}): {line[:200]}") from error
    return None


def _parse_version(fields: dict[str, Any]) -> VersionRow:
    engines = fields["engines"]
    return VersionRow(
        version=int(fields["version"]),
        step=int(fields["step"]),
        loss=float(fields["loss"]),
        num_bytes=int(fields["num_bytes"]),
        stage_s=float(fields["stage_s"]),
        pause_ms=float(fields["pause_ms"]),
        checksums_checked=int(fields["checksums_checked"]),
        served=bool(engines) and all(engine["state"] == "serving" for engine in engines),
    )
