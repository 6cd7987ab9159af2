"""Rounds in turns: every contestant once a round, after a round that is not counted.

times = take_turns({"ours": ours, "theirs": theirs}, rounds=5)       # times["ours"]: 5 values
"""

from collections.abc import Callable, Mapping


def take_turns(contestants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each contestant answered in each round. Who comes first changes from round to round.

    The first round faults memory in, opens connections and fills caches on all sides; it is left out.
    """
    values: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(rounds + 1):
        for name in names if number % 2 else reversed(names):
            value = contestants[name]()
            if number:
                values[name].append(value)
    return values
