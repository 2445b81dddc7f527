"""How narrowly the experts of a run were chosen: near a tie, rounding decides."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

KNIFE_EDGE = 2e-6
"""Scores, from 0 to 1, that are closer than this are in another order on another layout."""


def noting_closest_choice(path: Path) -> partial[None]:
    """Return what each rank of a job calls first, for :func:`closest_choice` to read afterwards."""
    return partial(_note_closest_choice, str(path))


def closest_choice(path: Path) -> float:
    """Return the least distance between the last expert chosen for a token and the next best."""
    return min((float(line) for line in path.read_text().split()), default=1.0)


def _note_closest_choice(path: str) -> None:
    import torch
    from megatron.core.transformer.moe.router import TopKRouter

    stock = TopKRouter.routing

    def routing(router: Any, logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        scores = logits.detach().view(-1, logits.size(-1)).float()
        sigmoid = router.config.moe_router_score_function == "sigmoid"
        scores = scores.sigmoid() if sigmoid else scores.softmax(dim=-1)
        if router.expert_bias is not None:
            scores = scores + router.expert_bias
        if router.topk < scores.size(-1):
            best = scores.sort(dim=-1, descending=True).values
            distance = (best[:, router.topk - 1] - best[:, router.topk]).min().item()
            with open(path, "a") as file:
                file.write(f"{distance}\n")
        return stock(router, logits, *args, **kwargs)

    Path(path).touch()
    TopKRouter.routing = routing
