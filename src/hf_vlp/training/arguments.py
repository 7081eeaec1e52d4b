"""The Trainer's arguments with defaults that fit vision-language pre-training, and those that it adds."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments


@dataclass
class VLPTrainingArguments(TrainingArguments):
    """`TrainingArguments` with more fields and these other defaults.

    Collators need every column (`remove_unused_columns`); contrastive losses want full batches, in training
    only (`dataloader_drop_last`); batches of images leave the box head unused (`ddp_find_unused_parameters`,
    which the stock Trainer switches off under gradient checkpointing); each process reads a stream by itself,
    since batches of texts padded to different lengths cannot be cut from one (`accelerator_config`); nothing
    is reported to a service unless asked for.

    - new_parameter_lr_multiplier: factor on the learning rate of `model.new_parameters`, which no checkpoint
      held (2 in X-VLM's pretraining).
    - per_device_region_batch_size: rows, that is images, of a batch of regions; that of images if None. The
      number of region-text pairs is the collator's matter.
    - region_probability: chance that a batch of regions goes before a batch of images.
    - alpha_ramp_epochs: epochs over which the weight of a momentum teacher's soft targets rises from 0 to the
      model's `config.alpha` (1 in most of ALBEF's schedules).
    - official_adamw: use `OfficialAdamW`, the rule that X-VLM's code trains with, in place of `optim`.
    - bert_adam: use `BertAdam`, that of LXMERT's code: every parameter decays, and a linear schedule is
      `bert_schedule`, whose warm-up is not rounded to whole steps.
    - sgd_adamw: use `SGDAdamW`, that of SOHO's code: the model's CNN (its trunk) learns by SGD with momentum
      0.9, `trunk_learning_rate` and `trunk_weight_decay`, all else by AdamW, and every parameter decays.
    - freeze_trunk_epochs: epochs for which the CNN stays as it is (10 in SOHO's paper, 0 in its code).
    - lr_milestones: epochs, ascending, at each of which learning rates are multiplied by
      `lr_milestone_factor`; between them they are constant, and the warm-up starts from a third of them. In
      place of `lr_scheduler_type`. With `max_steps` milestones count as shares of `num_train_epochs`.
    - group_by_orientation: batches hold either images wider than tall or others, so that less of them is
      padding (`hf_vlp.data.orientation`).
    - answer_loss_weights: weight of the answer loss of LXMERT's pretraining in each epoch; the last one
      holds for all later epochs. None leaves the model's own.

    Raises:
        ValueError: a multiplier that is not positive, a probability outside 0..1, a batch size below 1, a
            negative number of epochs, rate or weight, milestones that do not ascend; more than one of
            `optim`, `official_adamw`, `bert_adam`, `sgd_adamw`, or of `lr_scheduler_type`, `lr_milestones`.
    """

    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Drop the columns that forward does not take."}
    )
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Drop the last, smaller training batch."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=True, metadata={"help": "Let batches of different kinds use different heads under DDP."}
    )
    report_to: None | str | list[str] = field(
        default="none", metadata={"help": "Services to report logs to."}
    )
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available,
        metadata={"help": "Pin memory; by default where there is a GPU."},
    )
    new_parameter_lr_multiplier: float = field(
        default=1.0, metadata={"help": "Factor on the learning rate of parameters that no checkpoint held."}
    )
    per_device_region_batch_size: int | None = field(
        default=None,
        metadata={"help": "Images per batch of regions; per_device_train_batch_size if not given."},
    )
    region_probability: float = field(
        default=0.5, metadata={"help": "Chance that a batch of regions goes before a batch of images."}
    )
    alpha_ramp_epochs: float = field(
        default=0.0, metadata={"help": "Epochs over which the teacher's weight rises to config.alpha."}
    )
    official_adamw: bool = field(
        default=False, metadata={"help": "Use the AdamW of the official X-VLM code."}
    )
    bert_adam: bool = field(
        default=False, metadata={"help": "Use the optimizer and schedule of the official LXMERT code."}
    )
    sgd_adamw: bool = field(
        default=False, metadata={"help": "Use the optimizer of the official SOHO code: SGD for the CNN."}
    )
    trunk_learning_rate: float = field(
        default=1e-2, metadata={"help": "Learning rate of the CNN with sgd_adamw."}
    )
    trunk_weight_decay: float = field(
        default=1e-4, metadata={"help": "Weight decay of the CNN with sgd_adamw."}
    )
    freeze_trunk_epochs: float = field(
        default=0.0, metadata={"help": "Epochs for which the CNN stays as it is."}
    )
    lr_milestones: list[float] | None = field(
        default=None, metadata={"help": "Epochs from which on the rate is multiplied once more."}
    )
    lr_milestone_factor: float = field(
        default=0.1, metadata={"help": "Factor on the learning rate at each of lr_milestones."}
    )
    group_by_orientation: bool = field(
        default=False, metadata={"help": "Keep images wider than tall apart from others in batches."}
    )
    answer_loss_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of the answer loss in each epoch, the last from then on."}
    )

    def __post_init__(self):
        if self.accelerator_config is None:
            self.accelerator_config = {"dispatch_batches": False}
        super().__post_init__()
        if self.new_parameter_lr_multiplier <= 0:
            raise ValueError(
                f"new_parameter_lr_multiplier is {self.new_parameter_lr_multiplier}; use a positive number"
            )
        if not 0 <= self.region_probability <= 1:
            raise ValueError(f"region_probability is {self.region_probability}; use 0 to 1")
        if self.per_device_region_batch_size is not None and self.per_device_region_batch_size < 1:
            raise ValueError(
                f"per_device_region_batch_size is {self.per_device_region_batch_size}; use 1 or more"
            )
        for name in ("alpha_ramp_epochs", "freeze_trunk_epochs", "trunk_learning_rate", "trunk_weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; use 0 or more")
        self._check_milestones()
        weights = self.answer_loss_weights
        if weights is not None and (not weights or min(weights) < 0):
            raise ValueError(f"answer_loss_weights is {weights}; give at least one number, none negative")
        default = type(self).__dataclass_fields__["optim"].default
        if (self.optim != default) + self.official_adamw + self.bert_adam + self.sgd_adamw > 1:
            raise ValueError(
                f"optim is {self.optim!r}, official_adamw {self.official_adamw}, bert_adam {self.bert_adam} "
                f"and sgd_adamw {self.sgd_adamw}; choose one optimizer and leave the others at their defaults"
            )

    def _check_milestones(self):
        milestones = self.lr_milestones
        if milestones is None:
            return
        if not milestones or milestones[0] <= 0 or sorted(set(milestones)) != list(milestones):
            raise ValueError(f"lr_milestones is {milestones}; give ascending epochs above 0")
        if self.lr_scheduler_type != type(self).__dataclass_fields__["lr_scheduler_type"].default:
            raise ValueError(
                f"lr_scheduler_type is {self.lr_scheduler_type!r} and lr_milestones {milestones}; choose one "
                "schedule and leave the other at its default"
            )
