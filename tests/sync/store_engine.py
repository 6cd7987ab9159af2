"""An engine of a store's fleet as a process of its own, driven by lines on its standard input.

python -m tests.sync.store_engine PLACE NAME       take / refuse REASON / end; says what it serves, one JSON a line
"""

import json
import sys

from tests.sync.disk_parts import QUICK

from weightcast.sync import follow
from weightcast.sync.errors import DeadlineExceeded


def main(place: str, name: str) -> None:
    """Join the fleet, and do what the lines say."""
    with follow(place, engine=name, limits=QUICK, agree=True) as subscriber:
        print(json.dumps("ready"), flush=True)
        for line in sys.stdin:
            word = json.loads(line)
            if word == "end":
                return
            try:
                update = subscriber.wait(10)
            except DeadlineExceeded as error:
                print(json.dumps(str(error)), flush=True)
                continue
            if word == "take":
                update.commit(pause_s=0.25)
            else:
                update.reject(word)
            print(json.dumps(update.version.number), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
