"""Gathering over processes that keeps gradients; the identity where there is one process."""

import torch
import torch.distributed as dist
from torch import Tensor


def num_processes() -> int:
    """Number of processes of the default group, 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(rows: Tensor, official_gradient: bool = False) -> Tensor:
    """Concatenate the rows of all processes, in order of rank: (n_rank, ...) -> (sum of n_rank, ...).

    The number of rows may differ between processes. Every process is taken to compute the same loss of the
    gathered rows and DDP to average gradients; then the gradient that reaches the encoders is the true one.
    With `official_gradient` it is 1/number of processes of that, as in the official X-VLM and ALBEF code.
    """
    if num_processes() == 1:
        return rows
    return _GatherRows.apply(rows, official_gradient)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, official_gradient: bool) -> Tensor:
        counts = _gather_equal(torch.tensor([rows.shape[0]], device=rows.device))
        counts = torch.cat(counts).tolist()
        ctx.start = sum(counts[: dist.get_rank()])
        ctx.length, ctx.official_gradient = rows.shape[0], official_gradient
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        return torch.cat([part[:n] for part, n in zip(_gather_equal(padded), counts, strict=True)])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        if not ctx.official_gradient:
            dist.all_reduce(gradient)
        return gradient[ctx.start : ctx.start + ctx.length], None


def _gather_equal(rows: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return parts
