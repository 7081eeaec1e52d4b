"""Optimizers of official codes, for training that has to follow theirs: AdamW as X-VLM and ALBEF run it,
BertAdam of LXMERT and its schedule, SGD and AdamW side by side as SOHO runs them and its schedule.
"""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


class OfficialOptimizer(torch.optim.Optimizer, ABC):
    """What all share: Adam's two moments of every parameter that has had a gradient.

    Raises:
        ValueError: lr, eps or weight_decay is negative, or a beta is outside 0..1.
    """

    settings: tuple[str, ...] = ("lr", "betas", "eps", "weight_decay")  # of a group, that a step reads

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        **defaults: float | None,
    ):
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"{name} is {value}; use a number of at least 0")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas is {betas}; use two numbers from 0 up to, not including, 1")
        defaults |= {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update every parameter that has a gradient; a `closure` computes loss and gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, **{name: group[name] for name in self.settings})
        return loss

    def _update(self, params: list[Tensor], lr: float, betas: tuple, eps: float, weight_decay: float):
        states = [self._state(p) for p in params]
        for state in states:
            state["step"] += 1
        gradients = [p.grad for p in params]
        means, squares = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        torch._foreach_lerp_(means, gradients, 1 - betas[0])
        torch._foreach_mul_(squares, betas[1])
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - betas[1])

        denominators = torch._foreach_sqrt(squares)
        torch._foreach_add_(denominators, eps)
        self._move(params, means, denominators, [s["step"] for s in states], lr, betas, weight_decay)

    @abstractmethod
    def _move(
        self,
        params: list[Tensor],
        means: list[Tensor],
        denominators: list[Tensor],
        steps: list[int],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ):
        """Change the parameters in place; `denominators` are sqrt(v) + eps."""

    def _state(self, param: Tensor) -> dict:
        state = self.state[param]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state


class OfficialAdamW(OfficialOptimizer):
    """AdamW by the rule of transformers 4, which differs from `torch.optim.AdamW` in two points.

    With corrections c1 = 1 - beta1^t and c2 = 1 - beta2^t, a step is p -= lr * sqrt(c2) / c1 * m / (sqrt(v) +
    eps), then p -= lr * weight_decay * p. So `eps` is not scaled up by the correction of early steps, which
    makes the first steps of parameters with gradients around `eps` larger, and decay acts on the new value.

    Raises:
        ValueError: lr, eps or weight_decay is negative, or a beta is outside 0..1.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        super().__init__(params, lr, betas, eps, weight_decay)

    def _move(self, params, means, denominators, steps, lr, betas, weight_decay):
        sizes = [-lr * (1 - betas[1] ** step) ** 0.5 / (1 - betas[0] ** step) for step in steps]
        torch._foreach_addcdiv_(params, means, denominators, sizes)
        if weight_decay:
            torch._foreach_mul_(params, 1 - lr * weight_decay)


class BertAdam(OfficialOptimizer):
    """Adam of the first BERT, without correction of early steps, as LXMERT's code trains with it.

    A step is p -= lr * (m / (sqrt(v) + eps) + weight_decay * p). For LXMERT's trajectory every parameter
    decays, biases and norms too, and the rate follows `bert_schedule`.

    Raises:
        ValueError: lr, eps or weight_decay is negative, or a beta is outside 0..1.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ):
        super().__init__(params, lr, betas, eps, weight_decay)

    def _move(self, params, means, denominators, steps, lr, betas, weight_decay):
        updates = torch._foreach_div(means, denominators)
        torch._foreach_add_(updates, params, alpha=weight_decay)
        torch._foreach_add_(params, updates, alpha=-lr)


class SGDAdamW(OfficialAdamW):
    """The two rules of SOHO's code: SGD for parameter groups with a `momentum`, for others `OfficialAdamW`.

    A step of SGD is b = momentum * b + (g + weight_decay * p), from b = 0, then p -= lr * b: decay enters the
    gradient. For SOHO's trajectory the CNN's group has momentum 0.9, and every parameter decays.

    Raises:
        ValueError: lr, eps or weight_decay is negative, or a beta is outside 0..1.
    """

    settings = (*OfficialOptimizer.settings, "momentum")

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ):
        OfficialOptimizer.__init__(self, params, lr, betas, eps, weight_decay, momentum=None)

    def _update(self, params, momentum, lr, weight_decay, **of_adam):
        if momentum is None:
            super()._update(params, lr=lr, weight_decay=weight_decay, **of_adam)
            return
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, [p.grad for p in params])
        torch._foreach_add_(buffers, params, alpha=weight_decay)
        torch._foreach_add_(params, buffers, alpha=-lr)


def bert_schedule(step: int, num_steps: int, warmup: float) -> float:
    """Factor on the learning rate of the update after `step` others: up to 1 over the share `warmup` of all
    steps, then down to 0, both linear. The first is 0, and so without effect; the end of the warm-up need
    not be a whole step.
    """
    progress = step / num_steps
    if progress < warmup:
        return progress / warmup
    return (1 - progress) / (1 - warmup) if progress < 1 else 0.0


def step_schedule(step: int, milestones: Sequence[int], factor: float, warmup: int) -> float:
    """Factor on the learning rate of the update after `step` others: over `warmup` updates linear from 1/3 to
    1, then `factor` once for each of the ascending `milestones` that is reached.
    """
    rise = 1 / 3 + 2 / 3 * step / warmup if step < warmup else 1.0
    return rise * factor ** bisect_right(milestones, step)
