"""Routing in which only the experts of the best groups may be chosen, with the group score of the HF model.

DeepSeek V2 scores a group of experts by its best one, V3 by the sum of its best two. Megatron sums as many as an expert
is chosen from a group on average (topk / groups), which is another number for V2. `GroupLimitedRouter` sums
`moe_router_group_score_experts` of them, a field of the provider, and is Megatron's router in all else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.router import TopKRouter

from weightcast.sync.errors import ConfigError

TopK = tuple[torch.Tensor, torch.Tensor]


def choose_experts(scores: torch.Tensor, topk: int, num_groups: int, group_topk: int, best: int) -> TopK:
    """The `topk` best scores among the experts of the `group_topk` best groups, and the experts' numbers.

    Scores are [tokens, experts], a group is `experts / num_groups` neighbours and scored by the sum of its `best` best.
    """
    by_group = scores.reshape(len(scores), num_groups, -1)
    group_scores = by_group.topk(best, dim=2).values.sum(2)
    chosen = torch.zeros_like(group_scores, dtype=torch.bool)
    chosen.scatter_(1, group_scores.topk(group_topk, dim=1).indices, True)
    masked = by_group.masked_fill(~chosen.unsqueeze(2), float("-inf")).flatten(1)
    values, experts = masked.topk(topk, dim=1)
    return values, experts


@dataclass
class _GroupChoice:
    """What Megatron asks for the choice of experts, in place of (or in front of) its record of choices."""

    best: int
    replay: Any = None

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., TopK] | None = None,
    ) -> TopK:
        def choose(scores: torch.Tensor, topk: int, num_groups: int, group_topk: int) -> TopK:
            return choose_experts(scores, topk, num_groups, group_topk, self.best)

        if self.replay is not None:
            result: TopK = self.replay.get_replay_topk(scores, topk, num_groups, group_topk, choose)
            return result
        assert num_groups is not None and group_topk is not None, "the provider limits routing to groups"
        return choose(scores, topk, num_groups, group_topk)


class GroupLimitedRouter(TopKRouter):  # type: ignore[misc]
    """Megatron's router, in which a group's score is that of its best experts."""

    def __init__(self, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        if config.moe_router_fusion:
            raise ConfigError(
                "moe_router_fusion=True scores groups of experts in Megatron's own way, which is not this model's; "
                "set moe_router_fusion=False"
            )
        # The one place where Megatron lets the choice itself be replaced is its record and replay of choices.
        replay: Any = self.router_replay
        self.router_replay: Any = _GroupChoice(config.moe_router_group_score_experts, replay)
