"""The Trainer's arguments with defaults that fit vision-language pre-training, and those that it adds."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments


@dataclass
class VLPTrainingArguments(TrainingArguments):
    """`TrainingArguments` with seven more fields and these other defaults.

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
    - answer_loss_weights: weight of the answer loss of LXMERT's pretraining in each epoch; the last one
      holds for all later epochs. None leaves the model's own.

    Raises:
        ValueError: a multiplier that is not positive, a probability outside 0..1, a batch size below 1, a
            negative number of epochs, a negative weight or none, more than one of `optim`, `official_adamw`
            and `bert_adam`.
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
        if self.alpha_ramp_epochs < 0:
            raise ValueError(f"alpha_ramp_epochs is {self.alpha_ramp_epochs}; use 0 or more")
        weights = self.answer_loss_weights
        if weights is not None and (not weights or min(weights) < 0):
            raise ValueError(f"answer_loss_weights is {weights}; give at least one number, none negative")
        default = type(self).__dataclass_fields__["optim"].default
        if (self.optim != default) + self.official_adamw + self.bert_adam > 1:
            raise ValueError(
                f"optim is {self.optim!r}, official_adamw {self.official_adamw} and bert_adam "
                f"{self.bert_adam}; choose one optimizer and leave the others at their defaults"
            )
