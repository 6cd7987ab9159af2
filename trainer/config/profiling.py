"""Which steps are looked at by torch's profiler.

cfg.profiling.use_pytorch_profiler = True
"""

from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class ProfilingConfig:
    """A trace of some steps on some ranks (`profiling.py`)."""

    use_pytorch_profiler: bool = False
    """Write traces of torch's profiler: what ran when, on the CPU and the GPU."""
    profile_step_start: int = 10
    """The first step that is profiled; 1 is the run's first."""
    profile_step_end: int = 12
    """The last step that is profiled."""
    profile_ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that are profiled."""
    record_shapes: bool = False
    """Write the shapes of the operators' inputs as well."""
    profile_memory: bool = False
    """Write what the operators allocate as well."""
    folder: str = "profile"
    """Folder of the traces, `rank<rank>-steps<first>-<last>.json.gz`, for Perfetto or chrome://tracing."""
