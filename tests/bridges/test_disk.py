"""A tensor-parallel Megatron model into a store of versions: what is assembled from it is what an export gives."""

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tests.bridges.no_collectives import no_collectives
from tests.ranks import run_ranks

from weightcast.bridges import AutoBridge
from weightcast.sync import DiskPublisher, DiskSubscriber, materialize

WAIT_S = 60.0


def publish_twice(source: str, store: str, out: str) -> list[object]:
    """Every rank writes an anchor and a delta with collectives forbidden; rank 0 compares with an export."""
    bridge = AutoBridge.from_hf_pretrained(source)
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size = 2
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    with DiskPublisher(bridge.weight_source(model), store, timeout_s=WAIT_S, config_from=Path(source)) as publisher:
        with no_collectives():
            publisher.publish(1)
            with torch.no_grad():
                for module in model:
                    for parameter in module.parameters():
                        parameter.view(-1)[::200] += 1
            report = publisher.publish(2)
        exported = {name: tensor.clone() for name, tensor in bridge.export_hf_weights(model, cpu=True)}
    if dist.get_rank() == 0:
        with DiskSubscriber(store) as subscriber:
            update = subscriber.wait(WAIT_S)
            assert update.version == report.version
            staged = dict(update)
            assert list(staged) == list(exported)
            assert all(torch.equal(staged[name], tensor) for name, tensor in exported.items())
            update.commit()
        materialize(store, Path(out))
        loaded = load_file(Path(out) / "model.safetensors")
        assert loaded.keys() == exported.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in exported.items())
        assert (Path(out) / "config.json").read_bytes() == (Path(source) / "config.json").read_bytes()
    return [report.is_anchor, report.has_delta, report.num_tensors == len(exported)]


def test_regions_of_a_tensor_parallel_trainer_come_together(tiny_models: Path, tmp_path: Path) -> None:
    said = run_ranks(publish_twice, 2, str(tiny_models / "qwen3"), str(tmp_path / "store"), str(tmp_path / "hf"))
    assert said == [[False, True, True]] * 2
