"""Official optimizers against plain re-implementations of their rules, and against torch where they agree."""

import math
from functools import partial

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from hf_vlp.training import BertAdam, OfficialAdamW
from hf_vlp.training.optimizers import bert_schedule


def scalar_adamw(value: float, gradients: list[float], lr: float, betas, eps: float, decay: float) -> float:
    """One number at a time, in Python floats."""
    mean = square = 0.0
    for step, gradient in enumerate(gradients, start=1):
        mean = betas[0] * mean + (1 - betas[0]) * gradient
        square = betas[1] * square + (1 - betas[1]) * gradient * gradient
        size = lr * math.sqrt(1 - betas[1] ** step) / (1 - betas[0] ** step)
        value -= size * mean / (math.sqrt(square) + eps)
        value -= lr * decay * value
    return value


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_fifty_steps_against_scalars(dtype, tolerance, decay):
    generator = torch.Generator().manual_seed(0)
    sizes = [10.0**-n for n in range(9, 1, -1)]  # gradients of 1e-9 to 1e-2
    params = [torch.nn.Parameter(torch.randn(6, generator=generator).to(dtype)) for _ in sizes]
    start = [p.detach().double().clone() for p in params]
    gradients = [
        [(torch.randn(6, generator=generator) * size).to(dtype) for _ in range(50)] for size in sizes
    ]
    optimizer = OfficialAdamW(params, lr=1e-3, weight_decay=decay)
    for step in range(50):
        for param, of_param in zip(params, gradients, strict=True):
            param.grad = of_param[step]
        optimizer.step()
    for param, before, of_param in zip(params, start, gradients, strict=True):
        for i in range(6):
            steps = [gradient[i].item() for gradient in of_param]
            expected = scalar_adamw(before[i].item(), steps, 1e-3, (0.9, 0.98), 1e-8, decay)
            assert param[i].item() == pytest.approx(expected, abs=tolerance)


def test_tiny_gradients_move_further_than_with_torch():
    """The reason for the class: eps is not scaled up by the correction of early steps."""
    steps = []
    for optimizer_class in (OfficialAdamW, torch.optim.AdamW):
        param = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        param.grad = torch.full_like(param, 1e-8)
        optimizer_class([param], lr=1e-3, betas=(0.9, 0.98), eps=1e-8, weight_decay=0).step()
        steps.append(param.item())
    assert steps[0] / steps[1] == pytest.approx((2 * math.sqrt(0.02)) / (1 + math.sqrt(0.02)), rel=1e-6)


def test_agrees_with_torch_without_eps_and_decay():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    settings = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 0.0, "weight_decay": 0.0}
    optimizers = [OfficialAdamW([ours], **settings), torch.optim.AdamW([theirs], **settings)]
    for _ in range(10):
        ours.grad = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_groups_schedules_and_missing_gradients():
    a, b, c = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    groups = [{"params": [a]}, {"params": [b, c], "lr": 2e-3, "weight_decay": 0.0}]
    optimizer = OfficialAdamW(groups, lr=1e-3, weight_decay=0.0)
    a.grad, b.grad = torch.ones(2), torch.ones(2)
    optimizer.step()
    assert (1 - b).tolist() == pytest.approx((2 * (1 - a)).tolist(), rel=1e-4)
    assert torch.equal(c, torch.ones(2)) and c not in optimizer.state
    c.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.state[a]["step"] == 2 and optimizer.state[c]["step"] == 1


def test_state_is_saved_and_loaded():
    def run(resume_at: int | None) -> torch.Tensor:
        param = torch.nn.Parameter(torch.linspace(-1, 1, 5))
        optimizer = OfficialAdamW([param], lr=1e-2)
        for step in range(6):
            if step == resume_at:
                state = optimizer.state_dict()
                optimizer = OfficialAdamW([param], lr=1.0)
                optimizer.load_state_dict(state)
            param.grad = torch.sin(torch.arange(5.0) + step)
            optimizer.step()
        return param.detach()

    assert torch.equal(run(None), run(3))


def test_closure():
    param = torch.nn.Parameter(torch.ones(1))
    optimizer = OfficialAdamW([param])

    def closure():
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 1
    assert param.item() < 1


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"eps": -1e-8}, "eps is"),
        ({"weight_decay": -0.1}, "weight_decay is"),
        ({"betas": (0.9, 1.0)}, "betas is"),
    ],
)
def test_errors(settings, match):
    for optimizer_class in (OfficialAdamW, BertAdam):
        with pytest.raises(ValueError, match=match):
            optimizer_class([torch.nn.Parameter(torch.ones(1))], **settings)


# BertAdam


def scalar_bert_adam(value: float, gradients: list[float], lr: float, warmup: float, decay: float) -> float:
    """One number at a time, in Python floats, with its schedule over as many steps as there are gradients."""
    mean = square = 0.0
    for step, gradient in enumerate(gradients):
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient * gradient
        done = step / len(gradients)
        factor = done / warmup if done < warmup else max((1 - done) / (1 - warmup), 0)
        value -= lr * factor * (mean / (math.sqrt(square) + 1e-6) + decay * value)
    return value


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
@pytest.mark.parametrize(("warmup", "decay"), [(0.05, 0.01), (0.125, 0.0)])  # 12.5 steps: no whole number
def test_a_hundred_steps_of_bert_adam_against_scalars(dtype, tolerance, warmup, decay):
    generator = torch.Generator().manual_seed(0)
    sizes = [10.0**-n for n in range(9, 1, -1)]
    params = [torch.nn.Parameter(torch.randn(3, generator=generator).to(dtype)) for _ in sizes]
    start = [p.detach().double().clone() for p in params]
    gradients = [
        [(torch.randn(3, generator=generator) * size).to(dtype) for _ in range(100)] for size in sizes
    ]
    optimizer = BertAdam(params, lr=1e-3, weight_decay=decay)
    scheduler = LambdaLR(optimizer, partial(bert_schedule, num_steps=100, warmup=warmup))
    for step in range(100):
        for param, of_param in zip(params, gradients, strict=True):
            param.grad = of_param[step]
        optimizer.step()
        scheduler.step()
    for param, before, of_param in zip(params, start, gradients, strict=True):
        for i in range(3):
            steps = [gradient[i].item() for gradient in of_param]
            expected = scalar_bert_adam(before[i].item(), steps, 1e-3, warmup, decay)
            assert param[i].item() == pytest.approx(expected, abs=tolerance)


def test_bert_adam_skips_only_missing_gradients():
    zero, missing = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    zero.grad = torch.zeros(2)
    BertAdam([zero, missing], lr=0.1, weight_decay=0.1).step()
    assert zero.tolist() == pytest.approx([0.99, 0.99]) and torch.equal(missing, torch.ones(2))


def test_bert_schedule():
    assert bert_schedule(0, 1003, 0.1) == 0
    assert bert_schedule(100, 1003, 0.1) == pytest.approx(100 / 100.3)
    assert bert_schedule(101, 1003, 0.1) == pytest.approx((1 - 101 / 1003) / 0.9)
    assert bert_schedule(1003, 1003, 0.1) == bert_schedule(1010, 1003, 0.1) == 0
    assert [bert_schedule(step, 4, 0.0) for step in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    assert [bert_schedule(step, 4, 1.0) for step in range(5)] == [0, 0.25, 0.5, 0.75, 0]
    assert max(bert_schedule(step, 10, 2.0) for step in range(10)) < 0.5
