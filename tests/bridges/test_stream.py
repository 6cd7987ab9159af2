"""A Megatron model as a source of versions: what a subscriber stages is what an export gives, bit for bit."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from tests.bridges.no_collectives import no_collectives
from tests.ranks import find_free_port, run_ranks

from weightcast.bridges import AutoBridge
from weightcast.sync import WeightPublisher, WeightSubscriber

FAMILIES = ("llama3.2", "qwen3", "gemma3")
WAIT_S = 60.0


def stage(address: str) -> dict[str, torch.Tensor]:
    """An engine: take one version and say that it is served."""
    with WeightSubscriber(address, engine="engine-0") as subscriber:
        update = subscriber.wait(WAIT_S)
        tensors = {name: tensor.clone() for name, tensor in update}
        update.commit()
        return tensors


def publish_and_export(models: str, ports: list[int], layout: dict[str, int]) -> list[str]:
    """Every rank publishes with collectives forbidden; rank 0 also has the engine."""
    done: list[str] = []
    for family, port in zip(FAMILIES, ports, strict=True):
        bridge = AutoBridge.from_hf_pretrained(Path(models, family))
        provider = bridge.to_megatron_provider()
        for name, size in layout.items():
            setattr(provider, name, size)
        provider.finalize()
        model = provider.provide_distributed_model(wrap_with_ddp=False)
        address = f"tcp://127.0.0.1:{port}"
        with ThreadPoolExecutor(1) as pool:
            with no_collectives(), WeightPublisher(bridge.weight_source(model), address, timeout_s=WAIT_S) as publisher:
                engine = pool.submit(stage, address) if dist.get_rank() == 0 else None
                publisher.wait_for_subscribers(1, WAIT_S)
                report = publisher.publish(1)
            staged = engine.result(WAIT_S) if engine is not None else None
        exported = dict(bridge.export_hf_weights(model, cpu=True))
        assert report.num_tensors == len(exported)
        if staged is not None:
            assert list(staged) == list(exported)
            for name, tensor in exported.items():
                assert staged[name].dtype == tensor.dtype and torch.equal(staged[name], tensor), name
        done.append(family)
    return done


def test_what_is_staged_is_what_is_exported(tiny_models: Path) -> None:
    ports = [find_free_port() for _ in FAMILIES]
    layout = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    assert run_ranks(publish_and_export, 2, str(tiny_models), ports, layout) == [list(FAMILIES)] * 2
