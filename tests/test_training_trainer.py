"""VLPTrainer and its arguments on tiny models: what is logged, which rows are seen, what decays."""

import math

import datasets
import pytest
import torch
from data_fixtures import picture
from safetensors import safe_open
from tiny import (
    image_batch,
    masked_batch,
    text_batch,
    tiny_albef_processor,
    tiny_config,
    tiny_processor,
)
from training_run import (
    arguments,
    image_rows,
    mixed_dataset,
    pretrainer,
    region_rows,
    saving_albef_pretrainer,
    weights,
)
from transformers import HfArgumentParser, TrainerCallback, TrainingArguments, get_scheduler, set_seed

from hf_vlp import (
    ALBEFForPreTraining,
    ALBEFForVisualEntailment,
    XVLMForGrounding,
    XVLMForPreTraining,
    XVLMForRetrieval,
)
from hf_vlp.data.collators import GroundingCollator, ImageTextCollator, RetrievalCollator
from hf_vlp.data.mixing import MixedDataset, MixedStream
from hf_vlp.data.task_collators import EntailmentCollator
from hf_vlp.models.outputs import VLPForPreTrainingOutput
from hf_vlp.training import RECIPES, OfficialAdamW, VLPTrainer, VLPTrainingArguments, recipe
from hf_vlp.training.trainer import LossTerms

TERMS = ("loss_itc", "loss_itm", "loss_mlm", "loss_bbox", "loss_giou")


def grounding_rows(count: int) -> list[dict]:
    return [
        {"image": picture(i), "text": "the red circle", "box": [5.0 + i, 6.0, 20.0, 30.0]}
        for i in range(count)
    ]


def retrieval_rows(count: int) -> list[dict]:
    return [{**row, "caption": row["caption"][0], "image_id": i} for i, row in enumerate(image_rows(count))]


def grounder(output_dir, rows: int = 12, **fields) -> VLPTrainer:
    trainer_fields = {
        name: fields.pop(name) for name in ("eval_dataset", "compute_metrics") if name in fields
    }
    set_seed(0)
    return VLPTrainer(
        XVLMForGrounding(tiny_config()),
        arguments(output_dir, **fields),
        train_dataset=datasets.Dataset.from_list(grounding_rows(rows)),
        data_collator=GroundingCollator(processor=tiny_processor()),
        **trainer_fields,
    )


def trained(output_dir, **fields) -> VLPTrainer:
    trainer = pretrainer(output_dir, **fields)
    trainer.train()
    return trainer


def logged(trainer: VLPTrainer, name: str = "loss") -> list[dict]:
    return [entry for entry in trainer.state.log_history if name in entry]


# What is logged


def test_every_term_is_logged(tmp_path):
    trainer = pretrainer(tmp_path)
    trainer.train()
    steps = logged(trainer)
    assert len(steps) == trainer.args.max_steps
    with_regions = [step for step in steps if "loss_bbox" in step]
    assert 0 < len(with_regions) < len(steps)
    for step in steps:
        terms = [step[name] for name in TERMS if name in step]
        assert len(terms) == (5 if step in with_regions else 3)
        assert step["loss"] == pytest.approx(sum(terms), abs=2e-4)


def test_terms_are_means_over_the_window(tmp_path):
    steps = logged(trained(tmp_path))
    for i, window in enumerate(logged(trained(tmp_path, logging_steps=7))):
        for name in TERMS:
            values = [step[name] for step in steps[7 * i : 7 * (i + 1)] if name in step]
            assert values and window[name] == pytest.approx(sum(values) / len(values), abs=1e-4)


def test_terms_stay_on_the_device():
    terms = LossTerms()
    for _ in range(3):  # a value of a meta tensor cannot be read
        terms.add(
            VLPForPreTrainingOutput(
                loss=torch.ones((), device="meta"), loss_itc=torch.ones((), device="meta")
            )
        )
    assert list(terms.sums) == ["loss_itc"] and terms.weights == {"loss_itc": 3}


def test_terms_start_anew():
    terms = LossTerms()
    terms.add(VLPForPreTrainingOutput(loss_itc=torch.tensor(1.0), loss_itm=torch.tensor(3.0)), weight=2)
    terms.add(VLPForPreTrainingOutput(loss_itc=torch.tensor(4.0)), weight=1)
    assert terms.means() == {"loss_itc": 2.0, "loss_itm": 3.0}
    assert terms.means() == {}


def test_evaluation_logs_terms_over_every_row(tmp_path):
    rows = datasets.Dataset.from_list(grounding_rows(7))  # batches of 4 and 3
    trainer = grounder(tmp_path, eval_dataset=rows, per_device_eval_batch_size=4)
    metrics = trainer.evaluate()
    whole = grounder(tmp_path, eval_dataset=rows, per_device_eval_batch_size=7).evaluate()
    for name in ("eval_loss", "eval_loss_bbox", "eval_loss_giou"):
        assert metrics[name] == pytest.approx(whole[name], abs=1e-5)
    assert metrics["eval_loss"] == pytest.approx(
        metrics["eval_loss_bbox"] + metrics["eval_loss_giou"], abs=1e-5
    )
    assert "eval_loss_bbox" in trainer.state.log_history[-1]


def test_evaluation_of_retrieval_and_of_several_datasets(tmp_path):
    rows = datasets.Dataset.from_list(retrieval_rows(6))
    trainer = VLPTrainer(
        XVLMForRetrieval(tiny_config()),
        arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1),
        train_dataset=rows,
        eval_dataset={"one": rows, "two": rows.select(range(4))},
        data_collator=RetrievalCollator(processor=tiny_processor()),
    )
    trainer.train()
    assert len(logged(trainer, "loss_itm")) == len(logged(trainer, "eval_one_loss_itm")) == 2
    assert all(entry["eval_two_loss_itc"] > 0 for entry in logged(trainer, "eval_two_loss_itc"))
    assert not any("loss_itm" in entry for entry in logged(trainer, "eval_two_loss_itc"))


# Data


def test_the_last_batch_is_dropped_in_training_only(tmp_path):
    seen = []
    rows = datasets.Dataset.from_list(grounding_rows(7))
    trainer = grounder(tmp_path, rows=7, eval_dataset=rows, num_train_epochs=1, max_steps=-1)
    assert [len(batch["input_ids"]) for batch in trainer.get_train_dataloader()] == [4]
    for loader in (trainer.get_eval_dataloader(), trainer.get_test_dataloader(rows)):
        seen.append(sum(len(batch["input_ids"]) for batch in loader))
    assert seen == [7, 7]
    assert trainer.args.dataloader_drop_last and trainer.data_collator.train
    assert trainer.predict(rows).predictions.shape == (7, 4)


def test_evaluation_is_not_augmented(tmp_path):
    rows = datasets.Dataset.from_list(grounding_rows(4))
    trainer = grounder(tmp_path, eval_dataset=rows)
    pixels = [next(iter(trainer.get_eval_dataloader()))["pixel_values"] for _ in range(2)]
    plain = tiny_processor()(
        images=[row["image"] for row in grounding_rows(4)], return_tensors="pt"
    ).pixel_values
    assert torch.equal(pixels[0], pixels[1]) and torch.equal(pixels[0], plain)
    mixed = pretrainer(tmp_path)
    with mixed._for_evaluation():
        assert not any(collator.train for collator in mixed.data_collator.collators.values())
    assert all(collator.train for collator in mixed.data_collator.collators.values())


def test_boxes_reach_compute_metrics(tmp_path):
    def compute_metrics(prediction):
        assert prediction.predictions.shape == prediction.label_ids.shape == (7, 4)
        return {"rows": len(prediction.label_ids)}

    rows = datasets.Dataset.from_list(grounding_rows(7))
    trainer = grounder(tmp_path, eval_dataset=rows, compute_metrics=compute_metrics)
    assert trainer.evaluate()["eval_rows"] == 7


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_rows_of_one_kind_train(tmp_path, streaming, workers):
    rows = datasets.Dataset.from_list(image_rows(9))
    if streaming:
        rows = rows.to_iterable_dataset(num_shards=2)
    set_seed(0)
    trainer = VLPTrainer(
        XVLMForPreTraining(tiny_config()),
        arguments(tmp_path, max_steps=5, dataloader_num_workers=workers),
        train_dataset=rows,
        data_collator=ImageTextCollator(processor=tiny_processor()),
    )
    before = weights(trainer)
    trainer.train()  # the last batch of a pass would have one row, hence no negatives
    assert trainer.state.global_step == 5
    assert any(not torch.equal(value, before[name]) for name, value in weights(trainer).items())
    assert all(torch.tensor(entry["loss"]).isfinite() for entry in logged(trainer))


def test_mixed_streams_train(tmp_path):
    image, region = (
        datasets.Dataset.from_list(rows).to_iterable_dataset() for rows in (image_rows(12), region_rows(6))
    )
    trainer = pretrainer(tmp_path, MixedStream(image, region, batch_size=4), max_steps=8)
    trainer.train()
    assert trainer.state.global_step == 8
    assert logged(trainer, "loss_giou")


def test_region_batches_have_their_size_and_share(tmp_path):
    trainer = pretrainer(tmp_path, region_probability=1.0, per_device_region_batch_size=2)
    sizes = [
        (len(batch["pixel_values"]), "target_boxes" in batch) for batch in trainer.get_train_dataloader()
    ]
    assert sizes == [(2, True), (4, False)] * 6


def test_own_datasets_and_collators_train_as_in_transformers(tmp_path):
    row = {**image_batch(1), **text_batch(1), **masked_batch(text_batch(1))}
    rows = [{name: value[0] for name, value in row.items()} for _ in range(8)]
    trainer = VLPTrainer(
        XVLMForPreTraining(tiny_config()), arguments(tmp_path, max_steps=2), train_dataset=rows
    )
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("fields", [{"bf16": True}, {"gradient_checkpointing": True}])
def test_half_precision_and_checkpointing_train(tmp_path, fields):
    plain, other = trained(tmp_path, max_steps=4), trained(tmp_path, max_steps=4, **fields)
    tolerance = 1e-4 if "gradient_checkpointing" in fields else 0.1
    for step, expected in zip(logged(other), logged(plain), strict=True):
        assert step["loss"] == pytest.approx(expected["loss"], rel=tolerance)
    assert all(value.dtype != torch.bfloat16 for value in other.model.state_dict().values())


# Optimisation


def groups(trainer: VLPTrainer) -> dict[str, tuple[float, float]]:
    """Learning rate and decay of each parameter."""
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    found = {}
    for group in trainer.create_optimizer().param_groups:
        for parameter in group["params"]:
            assert names[parameter] not in found
            found[names[parameter]] = (group["lr"], group["weight_decay"])
    assert found.keys() == set(names.values())
    return found


def test_what_decays(tmp_path):
    found = groups(pretrainer(tmp_path, weight_decay=0.01))
    kept = {name for name, (_, decay) in found.items() if decay == 0}
    assert any("relative_position_bias_table" in name for name in kept)
    for name in found:
        assert (name in kept) == ("bias" in name or "norm" in name.lower())


def test_the_official_code_decays_the_norms_of_heads(tmp_path):
    stock = groups(pretrainer(tmp_path, weight_decay=0.01))
    official = groups(pretrainer(tmp_path, weight_decay=0.01, official_adamw=True))
    different = {name for name in stock if stock[name] != official[name]}
    assert different == {"itm_head.layer_norm.weight", "bbox_head.layer_norm.weight"}


@pytest.mark.parametrize("official", [False, True])
def test_new_parameters_learn_faster(tmp_path, official):
    trainer = pretrainer(
        tmp_path, new_parameter_lr_multiplier=2.0, learning_rate=1e-3, official_adamw=official
    )
    trainer.model.new_parameters = frozenset(
        name for name, _ in trainer.model.named_parameters() if "_head" in name
    )
    found = groups(trainer)
    for name, (rate, _) in found.items():
        assert rate == (2e-3 if "_head" in name else 1e-3)
    assert {decay for name, (_, decay) in found.items() if "_head" in name} == {
        0.0,
        trainer.args.weight_decay,
    }
    assert isinstance(trainer.optimizer, OfficialAdamW) == official
    assert trainer.optimizer.defaults["betas"] == (0.9, 0.999)
    trainer.create_scheduler(num_training_steps=10)  # factors act on each group's own rate
    rates = {group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert rates == {1e-3, 2e-3}


def test_a_given_optimizer_is_kept(tmp_path):
    model = XVLMForGrounding(tiny_config())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = VLPTrainer(model, arguments(tmp_path, official_adamw=True), optimizers=(optimizer, None))
    assert trainer.create_optimizer() is optimizer


def test_accumulation_warns_of_negatives_once(tmp_path, monkeypatch):
    from hf_vlp.training import trainer as trainer_module

    warned = []
    monkeypatch.setattr(trainer_module.logger, "warning_once", warned.append)
    grounder(tmp_path, max_steps=2, gradient_accumulation_steps=2).train()
    pretrainer(tmp_path, max_steps=2).train()
    assert not warned
    pretrainer(tmp_path, max_steps=2, gradient_accumulation_steps=2).train()
    assert set(warned) == {trainer_module._NEGATIVES_WARNING}


def test_checkpoints_load_as_models(tmp_path):
    trainer = pretrainer(tmp_path, max_steps=2)
    trainer.train()
    trainer.save_model()
    loaded = XVLMForPreTraining.from_pretrained(tmp_path)
    assert not loaded.new_parameters
    for name, value in weights(trainer).items():
        assert torch.equal(value, loaded.state_dict()[name])


# Arguments


def test_defaults(tmp_path):
    args = VLPTrainingArguments(output_dir=str(tmp_path), use_cpu=True, gradient_checkpointing=True)
    assert not args.remove_unused_columns and args.dataloader_drop_last and args.report_to == []
    assert args.ddp_find_unused_parameters and args.accelerator_config.dispatch_batches is False
    assert args.new_parameter_lr_multiplier == 1.0 and not args.official_adamw


def test_arguments_parse_from_a_command_line(tmp_path):
    command = f"--output_dir {tmp_path} --use_cpu --new_parameter_lr_multiplier 2 --official_adamw".split()
    (args,) = HfArgumentParser(VLPTrainingArguments).parse_args_into_dataclasses(command)
    assert args.new_parameter_lr_multiplier == 2.0 and args.official_adamw


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(tmp_path, name):
    args = recipe(name, str(tmp_path), use_cpu=True)
    pretraining = name.endswith(("_pretrain", "_4m", "_16m"))
    if name.startswith("xvlm"):
        assert args.official_adamw and args.weight_decay == 0.01 and args.lr_scheduler_type == "linear"
        assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (0.9, 0.98, 1e-8)
        rates = {
            "xvlm_pretrain_4m": 1e-4,
            "xvlm_pretrain_16m": 1e-4,
            "xvlm_vqa": 5e-5,
            "xvlm_caption": 1e-5,
            "xvlm_caption_scst": 1e-5,
        }
        assert args.learning_rate == ({"xvlm_grounding_weak": 2e-5} | rates).get(name, 3e-5)
        assert args.max_grad_norm == (1.0 if pretraining else 0.0)
    elif name.startswith("lxmert"):
        assert args.bert_adam and args.weight_decay == 0.01 and args.lr_scheduler_type == "linear"
        assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (0.9, 0.999, 1e-6)
        assert (args.max_grad_norm, args.warmup_steps) == ((1.0, 0.05) if "pretrain" in name else (5.0, 0.1))
    elif name.startswith("soho"):
        assert args.sgd_adamw and args.weight_decay == 0.01 and args.trunk_learning_rate == 1e-2
        assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (0.9, 0.999, 1e-6)
        assert (args.learning_rate, args.warmup_steps) == (1e-4, 500)
    else:
        assert not args.official_adamw and args.weight_decay == 0.02 and args.max_grad_norm == 0
        assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (0.9, 0.999, 1e-8)
        assert args.lr_scheduler_type == "cosine_with_min_lr"
        assert args.learning_rate == (1e-4 if pretraining else args.learning_rate)
    assert recipe(name, str(tmp_path), use_cpu=True, seed=7, learning_rate=1e-3).learning_rate == 1e-3


def test_xvlm_recipes_of_pretraining(tmp_path):
    for name in RECIPES:
        if name.startswith("xvlm"):
            args, pretraining = recipe(name, str(tmp_path), use_cpu=True), name.startswith("xvlm_pretrain")
            assert args.new_parameter_lr_multiplier == (2 if pretraining or name == "xvlm_vqa" else 1)
            assert args.get_warmup_steps(1000) == (3750 if pretraining else 100)


def test_albef_recipes_end_at_their_lowest_rate(tmp_path):
    for name, start, end in (("albef_pretrain", 1e-4, 1e-5), ("albef_vqa", 2e-5, 1e-6)):
        args = recipe(name, str(tmp_path), use_cpu=True)
        parameter = torch.nn.Parameter(torch.zeros(1))
        schedule = get_scheduler(
            args.lr_scheduler_type,
            torch.optim.SGD([parameter], lr=args.learning_rate),
            num_warmup_steps=args.get_warmup_steps(5000),
            num_training_steps=5000,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        rates = []
        for _ in range(5000):
            rates.append(schedule.get_last_lr()[0])
            schedule.optimizer.step()
            schedule.step()
        assert max(rates) == pytest.approx(start) and rates[-1] == pytest.approx(end, rel=0.01)


# Teachers


def test_alpha_rises_over_the_first_epochs(tmp_path):
    seen = []

    class Seen(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(model.distillation_weight)

    trainer = saving_albef_pretrainer(tmp_path, callbacks=[Seen()], max_steps=14)  # 6 steps an epoch
    trainer.train()
    assert seen == pytest.approx([0.4 * min(1, step / 12) for step in range(14)])
    saved = ALBEFForPreTraining.from_pretrained(tmp_path / "checkpoint-12")
    assert saved.config.momentum_teacher and saved.distillation_weight == 0.4


def test_a_fine_tune_from_an_export_and_what_it_saves(tmp_path):
    """Checkpoints hold the teacher, what is saved in the end does not."""
    trainer = saving_albef_pretrainer(tmp_path / "pretrained", max_steps=4)
    trainer.train()
    trainer.save_model()
    model = ALBEFForVisualEntailment.from_pretrained(tmp_path / "pretrained", momentum_teacher=True)
    rows = [{**row, "sentence": row["caption"][0], "label": i % 3} for i, row in enumerate(image_rows(8))]
    tuner = VLPTrainer(
        model,
        arguments(tmp_path / "tuned", save_strategy="steps", save_steps=2, max_steps=2),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=EntailmentCollator(processor=tiny_albef_processor()),
    )
    tuner.train()
    assert math.isfinite(tuner.evaluate()["eval_loss"])
    tuner.save_model()
    for folder, holds in ((tmp_path / "tuned" / "checkpoint-2", True), (tmp_path / "tuned", False)):
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert any(name.startswith("teacher.") for name in file.keys()) == holds
    trained = {p for group in tuner.optimizer.param_groups for p in group["params"]}
    assert trained == {p for p in model.parameters() if p.requires_grad}
    assert not trained & set(model.teacher.parameters())


def test_recipes_count_region_steps():
    for name, image_steps in (("xvlm_pretrain_4m", 204_795), ("xvlm_pretrain_16m", 200_640)):
        assert RECIPES[name]["max_steps"] == image_steps + round((image_steps + 0.5) / 2)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"new_parameter_lr_multiplier": 0.0}, "new_parameter_lr_multiplier is 0.0"),
        ({"region_probability": 1.5}, "region_probability is 1.5"),
        ({"alpha_ramp_epochs": -1.0}, "alpha_ramp_epochs is -1.0"),
        ({"per_device_region_batch_size": 0}, "per_device_region_batch_size is 0"),
        ({"official_adamw": True, "optim": "adafactor"}, "optim is"),
        ({"official_adamw": True, "bert_adam": True}, "official_adamw True, bert_adam True and sgd_adamw"),
        ({"answer_loss_weights": []}, r"answer_loss_weights is \[\]; give at least one"),
        ({"answer_loss_weights": [1.0, -1.0]}, r"answer_loss_weights is \[1.0, -1.0\]"),
    ],
)
def test_argument_errors(tmp_path, fields, match):
    with pytest.raises(ValueError, match=match):
        arguments(tmp_path, **fields)


def test_trainer_errors(tmp_path):
    with pytest.raises(ValueError, match="args is TrainingArguments"):
        VLPTrainer(XVLMForGrounding(tiny_config()), TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="XVLMForGrounding learns from no teacher"):
        VLPTrainer(XVLMForGrounding(tiny_config()), arguments(tmp_path, alpha_ramp_epochs=1.0))
    with pytest.raises(ValueError, match="XVLMForGrounding has no answer loss to weigh"):
        VLPTrainer(XVLMForGrounding(tiny_config()), arguments(tmp_path, answer_loss_weights=[0.0, 1.0]))
    with pytest.raises(ValueError, match="name is 'xvlm_pretrain'; the recipes are albef_pretrain"):
        recipe("xvlm_pretrain", str(tmp_path))
    with pytest.raises(ValueError, match="has 3 rows"):
        grounder(tmp_path, rows=3).train()
    own = VLPTrainer(
        XVLMForGrounding(tiny_config()),
        arguments(tmp_path),
        train_dataset=grounding_rows(3),
        data_collator=list,
    )
    with pytest.raises(ValueError, match="train_dataset has 3 rows"):
        own.train()


def test_mixed_dataset_of_one_kind_needs_no_mixed_collator(tmp_path):
    trainer = grounder(tmp_path, max_steps=2)
    trainer.train_dataset = MixedDataset(trainer.train_dataset)
    trainer.train()
    assert trainer.state.global_step == 2
    assert len(mixed_dataset()) == 36
