"""The engine's half: take one version, complete and verified, and say that it is served.

    python examples/receive.py tcp://127.0.0.1:5600

An adapter does this for vLLM and for the embedded engine; this is for an engine of your own.
"""

import argparse

from weightcast.sync import WeightSubscriber


def main() -> None:
    """Wait for a version, look at its tensors, commit it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", nargs="?", default="tcp://127.0.0.1:5600", help="the publisher's address")
    options = parser.parse_args()

    with WeightSubscriber(options.address) as subscriber:
        update = subscriber.wait(timeout_s=120)  # staged, complete, verified
        num_tensors = len(update)
        for name, tensor in update:
            print(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))  # an engine loads it here
        update.commit()  # now it serves this version
        print(f"serving version {update.version.number}: {num_tensors} tensors")


if __name__ == "__main__":
    main()
