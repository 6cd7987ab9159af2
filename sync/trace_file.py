"""`weightcast trace`: a run's event logs and reports, read, merged, drawn and written.

for line in write_trace([Path("out/demo/events")], Path("trace.json")):
    print(line)
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from weightcast.sync.errors import StorageError
from weightcast.sync.trace import build_trace
from weightcast.sync.trace_input import read_recording
from weightcast.sync.trace_merge import merge_phases


def write_trace(events: Sequence[Path], out: Path) -> Iterator[str]:
    """Write the trace to `out`; lines that say what is in it, and what was left out.

    Raises `ConfigError` for a malformed line of the logs, with its number, and `StorageError` when `out` cannot be
    written.
    """
    recording = read_recording(events)
    phases = merge_phases(recording)
    drawn = json.dumps(build_trace(phases, recording.reports), allow_nan=False)
    try:
        out.write_text(drawn + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write the trace to {out}: {error}; name another file with --out") from error
    versions, processes = {phase.version for phase in phases} - {None}, {phase.process for phase in phases}
    yield (
        f"{out}: {len(phases)} phases of {len(processes)} processes, {len(versions)} versions, "
        f"{len(recording.reports)} reports; open it in https://ui.perfetto.dev"
    )
    if recording.num_figures:
        yield f"without a time, left out: {recording.num_figures} lines of figures"
    if recording.num_unfinished:
        yield f"still being written, left out: the last line of {recording.num_unfinished} files"
