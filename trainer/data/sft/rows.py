"""Which tokens of which records are used: what is too long is cut, left out or refused, and always said. Pure.

rows, report = choose_rows(store, seq_length=2048, too_long="truncate")
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weightcast.sync.errors import ConfigError
from weightcast.trainer.data.sft.store import SftStore

TOO_LONG = ("truncate", "drop", "refuse")


@dataclass(frozen=True, slots=True)
class Rows:
    """From where to where each used record goes in the store's tokens; both are int64 [rows]."""

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]

    def take(self, chosen: NDArray[np.int64]) -> "Rows":
        """The rows at these indices."""
        return Rows(self.starts[chosen], self.ends[chosen])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Positions that each row fills: one fewer than its tokens, because the last is a label alone."""
        return self.ends - self.starts - 1


@dataclass(frozen=True, slots=True)
class RowsReport:
    """What became of the records."""

    num_records: int
    num_cut: int
    """Records that were cut to `seq_length` + 1 tokens."""
    num_dropped: int
    """Records left out because they are too long."""
    num_untrained: int
    """Records left out because nothing of what is left of them is trained on."""
    num_tokens: int
    num_trained: int

    def __str__(self) -> str:
        return (
            f"{self.num_records} records: {self.num_cut} cut, {self.num_dropped} too long and left out, "
            f"{self.num_untrained} left out because the cut took all that is trained on; {self.num_tokens} tokens, "
            f"{self.num_trained} of them trained on"
        )


def choose_rows(store: SftStore, *, seq_length: int, too_long: str) -> tuple[Rows, RowsReport]:
    """The rows of at most `seq_length` positions. Raises `ConfigError` when none is left, or one is to be refused."""
    starts, ends = store.starts[:-1], store.starts[1:]
    long = ends - starts - 1 > seq_length
    if too_long == "refuse" and long.any():
        first = int(long.argmax())
        raise ConfigError(
            f"{int(long.sum())} of {len(starts)} records are longer than dataset.seq_length={seq_length}; the first is "
            f"record {first}, counted from 0, with {int(ends[first] - starts[first])} tokens: raise the length, or set "
            "dataset.too_long=truncate or drop"
        )
    keep = ~long if too_long == "drop" else np.ones(len(starts), dtype=bool)
    cut_ends = np.minimum(ends, starts + seq_length + 1)
    trained_before = np.concatenate([[0], np.cumsum(store.trained, dtype=np.int64)])
    # A record's first token is nobody's label.
    num_trained = trained_before[cut_ends] - trained_before[np.minimum(starts + 1, cut_ends)]
    used = keep & (num_trained > 0)
    report = RowsReport(
        num_records=len(starts),
        num_cut=int((long & used).sum()),
        num_dropped=int((~keep).sum()),
        num_untrained=int((keep & (num_trained == 0)).sum()),
        num_tokens=int((cut_ends - starts)[used].sum()),
        num_trained=int(num_trained[used].sum()),
    )
    if not used.any():
        raise ConfigError(f"nothing to train on; {report}")
    return Rows(starts[used], cut_ends[used]), report
