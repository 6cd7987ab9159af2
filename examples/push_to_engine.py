"""The trainer's half: import a Hugging Face checkpoint at TP = number of ranks, publish it as version 1.

    torchrun --nproc-per-node 2 examples/push_to_engine.py path/to/hf tcp://127.0.0.1:5600

Start `receive.py` beside it, before or after: version 1 waits for one engine.
"""

import argparse
import os

from weightcast.bridges import AutoBridge
from weightcast.sync import WeightPublisher


def main() -> None:
    """Every rank runs this."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("address", nargs="?", default="tcp://127.0.0.1:5600", help="where engines subscribe")
    options = parser.parse_args()

    bridge = AutoBridge.from_hf_pretrained(options.model)
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size = int(os.environ.get("WORLD_SIZE", "1"))
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    with WeightPublisher(bridge.weight_source(model), options.address) as publisher:
        publisher.wait_for_subscribers(1, timeout_s=60)
        report = publisher.publish(version=1)
    if os.environ.get("RANK", "0") == "0":
        phases = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in report.phases_s.items())
        print(f"version 1: {report.num_bytes} bytes, {phases}, served by {', '.join(report.serving)}")


if __name__ == "__main__":
    main()
