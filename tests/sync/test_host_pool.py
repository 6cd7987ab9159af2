"""The arena in which a model lies for the workers of a host."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tests.sync.host_peer import SHAPES, make_tensors
from tests.sync.host_share_parts import SPECS, WAIT_S, follow, lead, stage
from tests.sync.parts import assert_same_bits, bits, wait_until

from weightcast.sync import Region, TensorSpec, Version
from weightcast.sync.errors import ConfigError, DeadlineExceeded
from weightcast.sync.host.pool import SharedPool, lay_out_pool, make_pool
from weightcast.sync.part_plan import box_key
from weightcast.sync.wanted import WantedRegions


def test_the_tensors_are_those_of_the_model(base: Path) -> None:
    leader, follower = lead(base), follow(base)
    assert leader.version is None and follower.version is None and follower.poll() is None
    stage(leader, 1)
    with follower.wait(timeout_s=WAIT_S) as lease, leader.take() or pytest.fail("no lease") as own:
        assert lease.version == own.version == Version(1, 1)
        assert list(lease.tensors) == list(SHAPES)
        for tensors in (lease.tensors, own.tensors):
            assert_same_bits(tensors, make_tensors(1))
    with pytest.raises(DeadlineExceeded, match=r"staged no version later than 1 \(epoch 1\) within 0\.1 s"):
        follower.wait(Version(1, 1), timeout_s=0.1)
    follower.close()
    wait_until(lambda: leader.num_followers == 0)
    leader.close()


def test_the_arena_is_laid_out_without_overlap_and_whatever_the_order() -> None:
    starts, num_bytes = lay_out_pool(SPECS)
    assert lay_out_pool(reversed(SPECS)) == (starts, num_bytes)
    ends = sorted((starts[spec.name], starts[spec.name] + spec.num_bytes) for spec in SPECS)
    assert all(start % 64 == 0 for start, _ in ends) and ends[0][0] >= 4096 and ends[-1][1] <= num_bytes
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    with pytest.raises(ConfigError, match="'matrix' is listed twice"):
        SharedPool.create([*SPECS, SPECS[0]])
    pool = SharedPool.create(SPECS)
    with pytest.raises(ConfigError, match="the shared copy was made for"):
        pool.take(TensorSpec("matrix", torch.float32, (1,)))
    assert SharedPool.create([]).tensors == {}


def test_a_pool_for_other_boxes_has_what_was_there_of_them_and_states_of_its_own() -> None:
    rows: list[WantedRegions] = [
        {
            spec.name: (spec.whole(),) if spec.name != "matrix" else (Region("matrix", (start, 0), (9, 70)),)
            for spec in SPECS
        }
        for start in (0, 6)
    ]
    pools = [make_pool(tuple(SPECS), rows[0])]
    pools[0].begin()
    for name, tensor in pools[0].tensors.items():
        tensor.copy_(make_tensors(1)[name.split("\0")[0]][tuple(slice(size) for size in tensor.shape)])
    staged = pools[0].finish(Version(1, 1))
    for wanted in (rows[1], None, rows[0]):
        before = pools[-1]
        pools.append(make_pool(tuple(SPECS), wanted, before))
        assert pools[-1].staged() is None and pools[-1].is_open
        again = pools[-1].finish(Version(1, 1))
        assert again.state > staged.state and pools[0].is_unchanged(pools[0].staged() or again)
        staged = again
    matrix = make_tensors(1)["matrix"]
    assert torch.equal(bits(pools[1].tensors[box_key(rows[1]["matrix"][0])][:3]), bits(matrix[6:9]))
    assert torch.equal(bits(pools[2].tensors["matrix"][6:9]), bits(matrix[6:9]))
    assert torch.equal(bits(pools[3].tensors[box_key(rows[0]["matrix"][0])][6:]), bits(matrix[6:9]))
    for pool in pools[:2] + pools[3:]:
        big = next(spec for spec in SPECS if spec.name == "big")
        assert torch.equal(pool.tensors[box_key(big.whole())], make_tensors(1)["big"])
