"""One process of a team: each loss on its part of a batch, with sums over devices, beside the whole batch's.

``torchrun --nproc-per-node=2 tests/losses_in_processes.py`` ends with 0 if they agree; ``test_ddp.py`` runs it.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import get_args

import torch
import torch.distributed as dist
from torch import Tensor

from liverseg.model.losses import LossConfig, LossName, Overlap, Sums, loss
from liverseg.training.process_group import ProcessGroup, process_group


def batch(case: str) -> tuple[Tensor, Tensor]:
    """Logits and fractions of four samples, float64; ``absent`` ones have no tumour, ``elsewhere`` only the last."""
    generator = torch.Generator().manual_seed(0)
    logits, other = (torch.randn(4, 3, 4, 5, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    fractions = other.softmax(dim=1)
    bare = {"everywhere": 0, "elsewhere": 3, "absent": 4}[case]
    fractions[:bare, 1] += fractions[:bare, 2]
    fractions[:bare, 2] = 0
    return 3 * logits, fractions


def gradient(logits: Tensor, fractions: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Value, and gradient with respect to one number that scales all logits, as a weight of a network does."""
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    value = loss(logits * scale, fractions, config)
    value.backward()  # type: ignore[no-untyped-call]
    assert scale.grad is not None
    return value.detach(), scale.grad


def compare(group: ProcessGroup, config: LossConfig, case: str, shared: Sums) -> None:
    """DistributedDataParallel's mean of the parts' gradients must be the whole's."""
    logits, fractions = batch(case)
    parts = slice(group.rank, None, group.size)
    whole = gradient(logits, fractions, config)
    own = gradient(logits[parts], fractions[parts], replace(config, sums=shared))
    for found, expected in zip(own, whole, strict=True):
        torch.testing.assert_close(group.sum(found) / group.size, expected, msg=f"{config} {case}")


def main() -> None:
    """Compare everything; the group is gone before the process is."""
    with process_group("cpu") as group:
        assert group.gather(group.share("abcde")) == list("abcde")
        assert group.gather(group.share("a")) == ["a"]
        for name, overlap in product(get_args(LossName), get_args(Overlap)):
            config = LossConfig(name=name, overlap=overlap, cross_entropy=0.5, alpha=0.7)
            for case in ("everywhere", "elsewhere", "absent"):
                compare(group, config, case, "devices")
                compare(group, replace(config, sums="sample"), case, "sample")
    assert not dist.is_initialized()


if __name__ == "__main__":
    main()
