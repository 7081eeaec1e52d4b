"""VLPTrainer on a tiny LXMERT: the optimizer of its code with its schedule, the weight of the answers."""

import math

import pytest
import torch
from tiny import tiny_lxmert_config, tiny_lxmert_processor
from training_run import arguments
from transformers import HfArgumentParser, TrainerCallback, set_seed

from hf_vlp import LXMERTForPreTraining
from hf_vlp.data.lxmert_collators import LXMERTPretrainingCollator
from hf_vlp.data.shapes import shapes_dataset
from hf_vlp.training import BertAdam, VLPTrainer, VLPTrainingArguments, recipe

ROWS, BATCH = 12, 4  # 3 steps an epoch


class SeenWeights(TrainerCallback):
    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(model.answer_weight)


def lxmert_rows() -> list[dict]:
    rows = shapes_dataset("captions", "train", ROWS, regions=True)
    return [{**row, "answers": [("yes", "no")[i % 2]]} for i, row in enumerate(rows)]


def pretrainer(output_dir, callbacks=None, **fields) -> VLPTrainer:
    set_seed(1)
    collator = LXMERTPretrainingCollator(
        processor=tiny_lxmert_processor(), answers=["yes", "no"], mismatch_probability=0.3
    )
    return VLPTrainer(
        LXMERTForPreTraining(tiny_lxmert_config(visual_feat_dim=48)),
        arguments(output_dir, per_device_train_batch_size=BATCH, bert_adam=True, **fields),
        train_dataset=lxmert_rows(),
        eval_dataset=lxmert_rows(),
        data_collator=collator,
        callbacks=callbacks,
    )


def test_every_parameter_decays(tmp_path):
    trainer = pretrainer(tmp_path, weight_decay=0.01, adam_epsilon=1e-6, new_parameter_lr_multiplier=2.0)
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, BertAdam)
    assert optimizer.defaults["betas"] == (0.9, 0.999) and optimizer.defaults["eps"] == 1e-6
    decaying = [
        p for group in optimizer.param_groups if group["weight_decay"] == 0.01 for p in group["params"]
    ]
    assert len(decaying) == len(list(trainer.model.parameters()))


@pytest.mark.parametrize(("warmup_steps", "knee"), [(0.1, 10.3), (20, 20)])
def test_the_warm_up_is_not_rounded(tmp_path, warmup_steps, knee):
    trainer = pretrainer(tmp_path, warmup_steps=warmup_steps, learning_rate=1e-2)
    trainer.create_optimizer()
    scheduler, rates = trainer.create_scheduler(103), []
    for _ in range(103):
        rates.append(scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        scheduler.step()
    expected = [min(step / knee, (103 - step) / (103 - knee)) for step in range(103)]
    assert rates == pytest.approx([1e-2 * factor for factor in expected])
    assert trainer.create_scheduler(103) is scheduler


def test_other_schedules_are_stock(tmp_path):
    trainer = pretrainer(tmp_path, lr_scheduler_type="constant", learning_rate=1e-2)
    trainer.create_optimizer()
    assert trainer.create_scheduler(10).get_last_lr() == [1e-2, 1e-2]


def test_the_first_step_moves_nothing(tmp_path):
    trainer = pretrainer(tmp_path, max_steps=1)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert all(map(torch.equal, before, trainer.model.parameters()))


def test_training_and_evaluation_log_every_term(tmp_path):
    trainer = pretrainer(tmp_path, max_steps=4, weight_decay=0.01)
    trainer.train()
    for terms in (trainer.state.log_history[0], trainer.evaluate()):
        for name in ("mlm", "itm", "object", "attribute", "feature", "answer"):
            (value,) = [term for key, term in terms.items() if key.endswith(f"loss_{name}")]
            assert math.isfinite(value)
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]


def test_the_weight_of_the_answers_follows_the_epochs(tmp_path):
    seen = SeenWeights()
    pretrainer(tmp_path, [seen], max_steps=11, answer_loss_weights=[0.0, 0.5, 2.0]).train()
    assert seen.weights == [0.0] * 3 + [0.5] * 3 + [2.0] * 5


def test_a_resumed_run_goes_on_with_its_weight(tmp_path):
    settings = {"answer_loss_weights": [0.0, 2.0], "save_strategy": "steps", "save_steps": 4, "max_steps": 6}
    whole = pretrainer(tmp_path, **settings)
    whole.train()
    seen = SeenWeights()
    resumed = pretrainer(tmp_path, [seen], **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert seen.weights == [2.0, 2.0]
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_arguments_parse_from_a_command_line(tmp_path):
    command = f"--output_dir {tmp_path} --use_cpu --bert_adam --answer_loss_weights 0 0 2".split()
    (args,) = HfArgumentParser(VLPTrainingArguments).parse_args_into_dataclasses(command)
    assert args.bert_adam and args.answer_loss_weights == [0.0, 0.0, 2.0]


@pytest.mark.parametrize(
    ("name", "rate", "batch", "epochs"),
    [
        ("lxmert_pretrain", 1e-4, 64, 20),
        ("lxmert_pretrain_paper", 1e-4, 64, 20),
        ("lxmert_vqa", 5e-5, 32, 4),
        ("lxmert_gqa", 1e-5, 32, 4),
        ("lxmert_nlvr2", 5e-5, 32, 4),
        ("lxmert_vizwiz", 1e-4, 64, 20),
    ],
)
def test_recipes(tmp_path, name, rate, batch, epochs):
    args = recipe(name, str(tmp_path), use_cpu=True)
    assert (args.learning_rate, args.per_device_train_batch_size) == (rate, batch)
    assert args.num_train_epochs == epochs and args.seed == 9595
    weights = {"lxmert_pretrain": [1.0], "lxmert_pretrain_paper": [0.0] * 10 + [2.0] * 10}
    assert args.answer_loss_weights == weights.get(name)
