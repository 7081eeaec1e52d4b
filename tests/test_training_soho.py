"""The training of SOHO: SGD for the CNN beside AdamW, the rate in steps, the CNN that thaws, batches of one
orientation, recipes.
"""

import math

import pytest
import torch
from torch import nn
from training_run import arguments
from transformers import HfArgumentParser, PreTrainedConfig, PreTrainedModel, TrainerCallback, set_seed
from transformers.utils import ModelOutput

from hf_vlp.data.collators import Collator
from hf_vlp.training import RECIPES, SGDAdamW, VLPTrainer, VLPTrainingArguments, recipe
from hf_vlp.training.optimizers import step_schedule

ROWS, BATCH = 12, 4  # 3 steps an epoch


def scalar_sgd(
    value: float, gradients: list[float], rates: list[float], momentum: float, decay: float
) -> float:
    """One number at a time, in Python floats."""
    velocity = 0.0
    for gradient, rate in zip(gradients, rates, strict=True):
        velocity = momentum * velocity + gradient + decay * value
        value -= rate * velocity
    return value


def scalar_adamw(value: float, gradients: list[float], rates: list[float], decay: float) -> float:
    mean = square = 0.0
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient * gradient
        size = rate * math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        value -= size * mean / (math.sqrt(square) + 1e-6)
        value -= rate * decay * value
    return value


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_sixty_steps_against_scalars(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    sizes = [1e-8, 1e-5, 1e-2]
    trunk, rest = (
        [nn.Parameter(torch.randn(3, generator=generator).to(dtype)) for _ in sizes] for _ in range(2)
    )
    start = [p.detach().double().clone() for p in trunk + rest]
    gradients = [
        [(torch.randn(3, generator=generator) * size).to(dtype) for _ in range(60)] for size in sizes * 2
    ]
    groups = [
        {"params": rest, "weight_decay": 1e-2},
        {"params": trunk, "lr": 1e-2, "weight_decay": 5e-2, "momentum": 0.9},
    ]
    optimizer = SGDAdamW(groups, lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: step_schedule(step, milestones=[30, 50], factor=0.1, warmup=10)
    )
    for step in range(60):
        for param, of_param in zip(trunk + rest, gradients, strict=True):
            param.grad = of_param[step]
        optimizer.step()
        scheduler.step()
    factors = [
        min(1, 1 / 3 + 2 / 3 * t / 10) * (0.1 if t >= 30 else 1) * (0.1 if t >= 50 else 1) for t in range(60)
    ]
    for number, (param, before, of_param) in enumerate(zip(trunk + rest, start, gradients, strict=True)):
        for i in range(3):
            steps = [gradient[i].item() for gradient in of_param]
            if number < len(trunk):
                rates = [1e-2 * factor for factor in factors]
                expected = scalar_sgd(before[i].item(), steps, rates, 0.9, 5e-2)
            else:
                expected = scalar_adamw(before[i].item(), steps, [1e-3 * factor for factor in factors], 1e-2)
            assert param[i].item() == pytest.approx(expected, abs=tolerance)


def test_sgd_is_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [
        SGDAdamW([{"params": [ours], "momentum": 0.9}], lr=1e-2, weight_decay=1e-4),
        torch.optim.SGD([theirs], lr=1e-2, momentum=0.9, weight_decay=1e-4),
    ]
    for _ in range(10):
        ours.grad = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        theirs.grad = ours.grad.clone()
        gradient = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(ours.grad, gradient)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_both_states_are_saved_and_loaded():
    def run(resume_at: int | None) -> torch.Tensor:
        trunk, rest = nn.Parameter(torch.linspace(-1, 1, 5)), nn.Parameter(torch.linspace(0, 2, 5))
        groups = [{"params": [rest]}, {"params": [trunk], "momentum": 0.9, "lr": 0.1}]
        optimizer = SGDAdamW(groups, lr=1e-2)
        for step in range(6):
            if step == resume_at:
                state = optimizer.state_dict()
                optimizer = SGDAdamW([{"params": [rest]}, {"params": [trunk]}], lr=1.0)
                optimizer.load_state_dict(state)
            rest.grad = trunk.grad = torch.sin(torch.arange(5.0) + step)
            optimizer.step()
        return torch.cat([rest.detach(), trunk.detach()])

    assert torch.equal(run(None), run(3))


def test_step_schedule():
    assert [step_schedule(step, [2, 4], 0.5, 0) for step in range(6)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert [step_schedule(step, [3], 0.1, 2) for step in range(4)] == pytest.approx([1 / 3, 2 / 3, 1, 0.1])


# With the Trainer


class TinyConfig(PreTrainedConfig):
    model_type = "tiny_soho_stand_in"


class Trunk(nn.Module):
    """A stem that is never trained, and a layer with batch normalisation."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(2, 4).requires_grad_(False)
        self.layer = nn.Linear(4, 4)
        self.normalization = nn.BatchNorm1d(4)

    def forward(self, inputs):
        return self.normalization(self.layer(self.stem(inputs)))


class TinyModel(PreTrainedModel):
    config_class = TinyConfig
    base_model_prefix = "model"
    accepts_loss_kwargs = False
    saves_code = False

    def __init__(self, config):
        super().__init__(config)
        self.model = nn.Module()
        self.model.backbone = Trunk()
        self.head = nn.Linear(4, 1)
        self.new_parameters = frozenset({"head.weight"})
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, pixel_values, labels=None):
        loss = (self.head(self.model.backbone(pixel_values))[:, 0] - labels).square().mean()
        return ModelOutput(loss=loss, loss_itm=loss.detach())


class NumberCollator(Collator):
    def __call__(self, rows):
        pixels = torch.tensor([row["pixels"] for row in rows])
        assert len({row["width"] > row["height"] for row in rows}) == 1 or not self.processor
        return {"pixel_values": pixels, "labels": pixels.sum(1)}


class Watch(TrainerCallback):
    """What the trunk is at the end of each step."""

    def __init__(self):
        self.states, self.rates = [], []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.states.append({name: value.clone() for name, value in model.model.backbone.state_dict().items()})

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append([group["lr"] for group in optimizer.param_groups if group["params"]])


def number_rows() -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"pixels": torch.randn(2, generator=generator).tolist(), "width": 1 + i % 2, "height": 1}
        for i in range(ROWS)
    ]


def trainer(output_dir, callbacks=None, check_orientation: bool = False, **fields) -> VLPTrainer:
    set_seed(1)
    fields = {"max_steps": 12, "sgd_adamw": True, "warmup_steps": 0, "max_grad_norm": 0.0, **fields}
    return VLPTrainer(
        TinyModel(TinyConfig()),
        arguments(output_dir, per_device_train_batch_size=BATCH, **fields),
        train_dataset=number_rows(),
        data_collator=NumberCollator(processor=check_orientation),
        callbacks=callbacks,
    )


def test_each_part_has_its_rule(tmp_path):
    one = trainer(tmp_path, weight_decay=0.01, adam_epsilon=1e-6, new_parameter_lr_multiplier=2.0)
    optimizer = one.create_optimizer()
    assert isinstance(optimizer, SGDAdamW)
    assert optimizer.defaults["betas"] == (0.9, 0.999) and optimizer.defaults["eps"] == 1e-6
    names = {parameter: name for name, parameter in one.model.named_parameters()}
    found = {
        names[parameter]: (group["lr"], group["weight_decay"], group["momentum"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    trained = {name for name, parameter in one.model.named_parameters() if parameter.requires_grad}
    assert found.keys() == trained
    for name, settings in found.items():
        expected = (1e-2, 1e-4, 0.9) if "backbone" in name else (1e-2, 0.01, None)
        assert settings == ((2e-2, 0.01, None) if name == "head.weight" else expected)


def test_a_training_follows_the_rules(tmp_path):
    """The Trainer's five steps, against steps written out."""
    one = trainer(
        tmp_path,
        max_steps=5,
        lr_scheduler_type="constant",
        weight_decay=0.1,
        adam_epsilon=1e-6,
        trunk_learning_rate=0.05,
        trunk_weight_decay=0.2,
    )
    set_seed(1)
    twin = TinyModel(TinyConfig()).train()
    collate, batches = one.data_collator, []
    one.data_collator = lambda rows: batches.append(collate(rows)) or batches[-1]
    one.train()
    first, second = ([torch.zeros_like(p) for p in twin.parameters()] for _ in range(2))
    for step, batch in enumerate(batches[:5], start=1):
        twin.zero_grad()
        twin(**batch).loss.backward()
        with torch.no_grad():
            for (name, p), m, v in zip(twin.named_parameters(), first, second, strict=True):
                if "head" in name:
                    m.copy_(0.9 * m + 0.1 * p.grad)
                    v.copy_(0.999 * v + 0.001 * p.grad**2)
                    p -= 1e-2 * math.sqrt(1 - 0.999**step) / (1 - 0.9**step) * m / (v.sqrt() + 1e-6)
                    p -= 1e-2 * 0.1 * p
                elif "stem" not in name:
                    m.copy_(0.9 * m + p.grad + 0.2 * p)
                    p -= 0.05 * m
    for ours, theirs in zip(one.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def same(one: dict, two: dict) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


def test_the_trunk_thaws(tmp_path):
    watch = Watch()
    one = trainer(tmp_path, [watch], freeze_trunk_epochs=2.0)
    start = {name: value.clone() for name, value in one.model.model.backbone.state_dict().items()}
    head = one.model.head.weight.detach().clone()
    one.train()
    assert all(same(start, state) for state in watch.states[:6])
    assert not torch.equal(one.model.head.weight, head)
    for name in ("layer.weight", "layer.bias", "normalization.weight", "normalization.running_mean"):
        values = [start[name], *(state[name] for state in watch.states[6:])]
        assert not any(torch.equal(a, b) for a, b in zip(values[:-1], values[1:], strict=True))
    assert torch.equal(watch.states[-1]["stem.weight"], start["stem.weight"])
    trained = {name for name, p in one.model.model.backbone.named_parameters() if p.requires_grad}
    assert trained == {"layer.weight", "layer.bias", "normalization.weight", "normalization.bias"}


def test_a_run_that_ends_in_the_freeze_leaves_nothing_frozen(tmp_path):
    one = trainer(tmp_path, max_steps=2, freeze_trunk_epochs=2.0)
    one.train()
    trunk = one.model.model.backbone
    assert trunk.layer.weight.requires_grad and not trunk.stem.weight.requires_grad
    assert not trunk._forward_pre_hooks


@pytest.mark.parametrize("saved_at", [2, 4, 9])  # in the freeze, in its last epoch, after it
def test_a_resumed_run_repeats_the_undisturbed_one(tmp_path, saved_at):
    settings = {
        "freeze_trunk_epochs": 2.0,
        "lr_milestones": [2.0, 3.0],
        "group_by_orientation": True,
        "num_train_epochs": 4,
        "max_steps": -1,
        "warmup_steps": 3,
        "save_strategy": "steps",
        "save_steps": saved_at,
    }
    whole = trainer(tmp_path, **settings)
    whole.train()
    resumed = trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved_at}"))
    assert whole.state.global_step == resumed.state.global_step
    assert same(whole.model.state_dict(), resumed.model.state_dict())


def test_rates_fall_at_their_epochs(tmp_path):
    watch = Watch()
    settings = {
        "max_steps": -1,
        "num_train_epochs": 4,
        "lr_milestones": [1.0, 3.0],
        "lr_milestone_factor": 0.5,
    }
    trainer(tmp_path, [watch], warmup_steps=2, learning_rate=1e-3, **settings).train()
    factors = [1 / 3, 2 / 3, 1, *[0.5] * 6, *[0.25] * 3]
    assert len(watch.rates) == 12
    for rates, factor in zip(watch.rates, factors, strict=True):
        assert sorted(rates) == pytest.approx([1e-3 * factor, 1e-2 * factor])


def test_milestones_are_shares_of_max_steps(tmp_path):
    one = trainer(tmp_path, lr_milestones=[25.0, 35.0], num_train_epochs=40, max_steps=80)
    one.create_optimizer()
    scheduler, rates = one.create_scheduler(80), []
    for _ in range(80):
        rates.append(scheduler.get_last_lr()[0])
        one.optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1e-2] * 50 + [1e-3] * 20 + [1e-4] * 10)


def test_batches_of_one_orientation(tmp_path):
    trainer(tmp_path, check_orientation=True, group_by_orientation=True).train()
    with pytest.raises(AssertionError):
        trainer(tmp_path, check_orientation=True).train()


def test_models_without_a_trunk(tmp_path):
    plain = TinyModel(TinyConfig())
    del plain.model.backbone
    for fields in ({"sgd_adamw": True}, {"freeze_trunk_epochs": 1.0}):
        with pytest.raises(ValueError, match="TinyModel has no CNN as `backbone`"):
            VLPTrainer(plain, arguments(tmp_path, **fields))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"sgd_adamw": True, "bert_adam": True}, "sgd_adamw True; choose one"),
        ({"freeze_trunk_epochs": -1.0}, "freeze_trunk_epochs is -1.0"),
        ({"trunk_learning_rate": -1.0}, "trunk_learning_rate is -1.0"),
        ({"lr_milestones": []}, r"lr_milestones is \[\]"),
        ({"lr_milestones": [0.0]}, r"lr_milestones is \[0.0\]"),
        ({"lr_milestones": [3.0, 3.0]}, r"lr_milestones is \[3.0, 3.0\]"),
        ({"lr_milestones": [3.0], "lr_scheduler_type": "cosine"}, "choose one schedule"),
    ],
)
def test_argument_errors(tmp_path, fields, match):
    with pytest.raises(ValueError, match=match):
        arguments(tmp_path, **fields)


def test_arguments_parse_from_a_command_line(tmp_path):
    command = f"--output_dir {tmp_path} --use_cpu --sgd_adamw --lr_milestones 25 35 --freeze_trunk_epochs 10"
    (args,) = HfArgumentParser(VLPTrainingArguments).parse_args_into_dataclasses(command.split())
    assert args.sgd_adamw and args.lr_milestones == [25.0, 35.0] and args.freeze_trunk_epochs == 10


@pytest.mark.parametrize(
    ("name", "rows_of_a_step", "epochs", "milestones", "clip"),
    [
        ("soho_pretrain", 32, 40, [25, 35], 10),
        ("soho_pretrain_paper", 32, 40, [25, 35], 10),
        ("soho_vqa", 64, 20, [12, 16], 4),
        ("soho_vqa_paper", 32, 18, [12, 16], 4),
        ("soho_nlvr2", 16, 18, [12, 16], 4),
        ("soho_entailment", 16, 6, [4], 4),
        ("soho_retrieval", 24, 20, [3, 5, 9, 13], 4),
    ],
)
def test_recipes(tmp_path, name, rows_of_a_step, epochs, milestones, clip):
    args = recipe(name, str(tmp_path), use_cpu=True)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == rows_of_a_step
    assert (args.num_train_epochs, args.lr_milestones, args.max_grad_norm) == (epochs, milestones, clip)
    assert args.lr_milestone_factor == (0.5 if name == "soho_retrieval" else 0.1)
    paper = name == "soho_pretrain_paper"
    assert (args.trunk_weight_decay, args.freeze_trunk_epochs) == ((5e-4, 10) if paper else (1e-4, 0))
    assert args.trunk_learning_rate == 1e-2 and args.get_warmup_steps(10**6) == 500


def test_every_recipe_is_tested():
    assert sum(name.startswith("soho") for name in RECIPES) == 7
