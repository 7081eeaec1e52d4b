"""The Trainer of all models: named loss terms, parameter groups, batches of one kind, resuming."""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, find_batch_size, gather_object
from huggingface_hub import HfApi
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, HubStrategy, TrainOutput, has_length, seed_worker
from transformers.utils import ModelOutput, PushInProgress, logging

from ..cards import CARD_MARK, persons_card, write_card
from ..data.collators import Collator
from ..data.mixing import MixedBatchSampler, MixedCollator, MixedDataset
from ..data.orientation import OrientationBatchSampler
from .arguments import VLPTrainingArguments
from .callbacks import AlphaRamp, AnswerLossWeights, TrunkFreeze, trunk_of
from .checkpoints import last_complete_checkpoint
from .optimizers import BertAdam, OfficialAdamW, SGDAdamW, bert_schedule, step_schedule
from .summary import last_evaluation, recipe_of

logger = logging.get_logger(__name__)

_NEGATIVES_WARNING = (
    "gradient_accumulation_steps is above 1: each micro-batch finds its negatives within itself, so that "
    "accumulation does not replace a large batch. Prefer a larger per_device_train_batch_size with "
    "gradient_checkpointing=True, or more processes."
)


class VLPTrainer(Trainer):
    """`transformers.Trainer` that also

    - logs every field `loss_*` of the model's output: in training the mean over the logging window, in
      evaluation `eval_loss_*`, the mean over rows; both over all processes;
    - raises the weight of a momentum teacher over `alpha_ramp_epochs`, and gives the answer loss its
      `answer_loss_weights`; leaves a CNN as it is for `freeze_trunk_epochs`;
    - gives `model.new_parameters` their own learning rate, and can use the official optimizers
      (`VLPTrainingArguments`);
    - trains on a `MixedDataset`, whose batches are of one kind on all processes. Rows that a collator of this
      package reads go the same way, so that a resumed run repeats the random choices of the undisturbed one;
    - evaluates every row, also with `dataloader_drop_last`, and with collators of this package unaugmented;
    - resumes from the last checkpoint that was written to its end (`train(resume_from_checkpoint=True)`);
    - pushes models with their code and a card of their recipe and scores, also in the middle of training.

    Raises:
        ValueError: `args` are no `VLPTrainingArguments`, or are about the teacher, the answer loss or the
            CNN of a model that has none; at training, fewer rows than one batch.
    """

    def __init__(self, model: nn.Module | None = None, args: VLPTrainingArguments | None = None, **kwargs):
        if not isinstance(args, VLPTrainingArguments):
            raise ValueError(f"args is {type(args).__name__}; give VLPTrainingArguments(output_dir, ...)")
        super().__init__(model, args, **kwargs)
        if not self.label_names and not self.can_return_loss:  # else evaluation computes no loss
            arguments = inspect.signature(self.model.forward).parameters
            self.label_names = [name for name in arguments if name.startswith("target_")]
        self.training_terms, self.evaluation_terms = LossTerms(), LossTerms()
        if args.alpha_ramp_epochs:
            if not hasattr(self.model, "distillation_weight"):
                raise ValueError(
                    f"alpha_ramp_epochs is {args.alpha_ramp_epochs}, but {type(self.model).__name__} learns "
                    "from no teacher; leave it at 0"
                )
            self.add_callback(AlphaRamp(args.alpha_ramp_epochs))
        if args.answer_loss_weights is not None:
            if not hasattr(self.model, "answer_weight"):
                raise ValueError(
                    f"answer_loss_weights is {args.answer_loss_weights}, but {type(self.model).__name__} has "
                    "no answer loss to weigh; leave it at None"
                )
            self.add_callback(AnswerLossWeights(args.answer_loss_weights))
        if (args.sgd_adamw or args.freeze_trunk_epochs) and trunk_of(self.model) is None:
            raise ValueError(
                f"sgd_adamw is {args.sgd_adamw} and freeze_trunk_epochs {args.freeze_trunk_epochs}, but "
                f"{type(self.model).__name__} has no CNN as `backbone`; leave both at their defaults"
            )
        if args.freeze_trunk_epochs:
            self.add_callback(TrunkFreeze(args.freeze_trunk_epochs))

    # Loss terms

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            self.training_terms.add(outputs)
            if self.args.gradient_accumulation_steps > 1 and "loss_itc" in outputs:
                logger.warning_once(_NEGATIVES_WARNING)
        else:
            self.evaluation_terms.add(outputs, find_batch_size(inputs))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self.training_terms.means())
        super().log(logs, start_time)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        self.evaluation_terms = LossTerms()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        means = self.evaluation_terms.means()
        output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in means.items()})
        return output

    # Data

    def get_train_dataloader(self) -> DataLoader:
        args, dataset = self.args, self.train_dataset
        if isinstance(dataset, IterableDataset):
            loader = self._prepare_loader(
                dataset, batch_size=args.train_batch_size, drop_last=args.dataloader_drop_last
            )
        elif isinstance(dataset, MixedDataset):
            loader = self._mixed_loader(dataset)
        elif isinstance(self.data_collator, Collator) and args.dataloader_drop_last:
            loader = self._mixed_loader(MixedDataset(dataset))
        else:
            loader = super().get_train_dataloader()
        if has_length(loader) and len(loader) == 0:
            raise ValueError(
                f"train_dataset has {len(dataset)} rows, fewer than one batch of per_device_train_batch_size "
                f"{args.per_device_train_batch_size} x {args.world_size} processes; use more rows, or less"
            )
        return loader

    def _mixed_loader(self, dataset: MixedDataset) -> DataLoader:
        args = self.args
        settings = {
            "batch_size": args.train_batch_size,
            "run_length": args.world_size * args.gradient_accumulation_steps,
            "seed": args.seed if args.data_seed is None else args.data_seed,
        }
        if args.group_by_orientation:
            sampler = OrientationBatchSampler(dataset, **settings)
        else:
            sampler = MixedBatchSampler(
                dataset,
                region_batch_size=args.per_device_region_batch_size,
                region_probability=args.region_probability,
                **settings,
            )
        return self._prepare_loader(dataset, batch_sampler=sampler)

    def _prepare_loader(self, dataset, **batching) -> DataLoader:
        args = self.args
        loader = DataLoader(
            dataset,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=partial(
                seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index
            ),
            **batching,
        )
        return self.accelerator.prepare(loader)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        with self._for_evaluation():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset) -> DataLoader:
        with self._for_evaluation():
            return super().get_test_dataloader(test_dataset)

    @contextlib.contextmanager
    def _for_evaluation(self) -> Iterator[None]:
        """What the stock Trainer does not keep apart: `dataloader_drop_last`, and the augmenting collator."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        collator, self.data_collator = self.data_collator, _without_augmentation(self.data_collator)
        try:
            yield
        finally:
            self.args.dataloader_drop_last, self.data_collator = drop_last, collator

    # Optimisation

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is not None:
            return self.optimizer
        args = self.args
        official = {OfficialAdamW: args.official_adamw, BertAdam: args.bert_adam, SGDAdamW: args.sgd_adamw}
        for optimizer_class, chosen in official.items():
            if chosen:
                betas = (args.adam_beta1, args.adam_beta2)
                settings = {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}
                self.optimizer_cls_and_kwargs = (optimizer_class, settings)
        optimizer = super().create_optimizer(model)
        if args.new_parameter_lr_multiplier != 1:
            rate = args.learning_rate * args.new_parameter_lr_multiplier
            _split_off(optimizer, self._new_parameters(), lr=rate)
        if args.sgd_adamw:
            _split_off(
                optimizer,
                set(trunk_of(self.model).parameters()),
                lr=args.trunk_learning_rate,
                weight_decay=args.trunk_weight_decay,
                momentum=0.9,
            )
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LRScheduler:
        factor = self._rate_factor(num_training_steps)
        if self.lr_scheduler is None and factor is not None:
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True  # so that another call of `train` makes a new one
        return super().create_scheduler(num_training_steps, optimizer)

    def _rate_factor(self, num_training_steps: int) -> Callable[[int], float] | None:
        """That of the schedules which transformers does not have."""
        args = self.args
        if args.lr_milestones is not None:
            steps = [
                round(epoch / args.num_train_epochs * num_training_steps) for epoch in args.lr_milestones
            ]
            warmup = args.get_warmup_steps(num_training_steps)
            return partial(step_schedule, milestones=steps, factor=args.lr_milestone_factor, warmup=warmup)
        if args.bert_adam and args.lr_scheduler_type == "linear":
            warmup = args.warmup_steps / (num_training_steps if args.warmup_steps >= 1 else 1)
            return partial(bert_schedule, num_steps=num_training_steps, warmup=warmup)
        return None

    def _new_parameters(self) -> set[nn.Parameter]:
        return {p for name, p in self.model.named_parameters() if name in self.model.new_parameters}

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters that decay, which biases, norms and Swin's relative positions do not.

        With `official_adamw` the norms of the two-layer heads do: the official list of names misses them.
        With `bert_adam` and `sgd_adamw` all parameters do.
        """
        if self.args.bert_adam or self.args.sgd_adamw:
            return [name for name, _ in model.named_parameters()]
        names = super().get_decay_parameter_names(model)
        if self.args.official_adamw:
            names += [
                name for name, _ in model.named_parameters() if name.endswith("_head.layer_norm.weight")
            ]
        return names

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """As in transformers; `True` resumes from the last checkpoint in `output_dir` that is complete.

        Raises:
            ValueError: `resume_from_checkpoint` is True and `output_dir` holds no such checkpoint.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"output_dir {self.args.output_dir} holds no complete checkpoint; "
                    "train with resume_from_checkpoint=False to start from the beginning"
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    # Saving and sharing

    def _save_checkpoint(self, model, trial):
        """Checkpoints stay plain; what is saved or pushed by name carries its code."""
        self.model.saves_code = False
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.model.saves_code = True

    def _push_from_checkpoint(self, checkpoint_folder: str):
        """Push what `save_model` writes, code and card included, where transformers pushes the checkpoint's
        plain files; with `hub_strategy` "checkpoint" or "all_checkpoints" also the checkpoint."""
        strategy, pending = self.args.hub_strategy, getattr(self, "push_in_progress", None)
        is_busy = pending is not None and not pending.is_done() and not self.args.hub_always_push
        if strategy == HubStrategy.END or broadcast_object_list([is_busy])[0]:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._finish_current_push()  # it reads the files that are written now
        self.model.saves_code = True
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return
        step = f"Training in progress, step {self.state.global_step}"
        try:
            self.create_model_card()
        except OSError as error:  # whether a person's card is there cannot be told
            return _tell_failure(step, error)
        api = HfApi(token=self.args.hub_token)  # one, which makes its commits one after the other
        jobs = [self._upload(api, self.args.output_dir, step, ignore_patterns=["_*", "checkpoint-*"])]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            is_last = strategy == HubStrategy.CHECKPOINT
            path = "last-checkpoint" if is_last else Path(checkpoint_folder).name
            jobs.append(self._upload(api, checkpoint_folder, f"{step}, checkpoint", path_in_repo=path))
        self.push_in_progress = PushInProgress(jobs)

    def _upload(self, api: HfApi, folder: str, message: str, **options) -> Future:
        """One commit, made while training goes on; a failure is told, and the next push holds more anyway."""
        job = api.upload_folder(
            repo_id=self.hub_model_id,
            folder_path=folder,
            commit_message=message,
            revision=self.args.hub_revision,
            run_as_future=True,
            **options,
        )
        job.add_done_callback(lambda done: done.cancelled() or _tell_failure(message, done.exception()))
        return job

    def create_model_card(
        self,
        model_name: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        dataset: str | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Write the card of the model with the recipe of this training into `output_dir`, unless a person
        wrote one there or on the Hub, which is kept.

        Args:
            model_name: the repository's name; by default that of `hub_model_id`.
            license: of the weights, in the names of the Hub.
            tags: more tags.
            dataset: what `metrics` were measured on.
            metrics: values by name, beside those of the last evaluation of this trainer.
        """
        if not self.is_world_process_zero():
            return
        repo_id = getattr(self, "hub_model_id", None)
        theirs = repo_id and persons_card(repo_id, self.args.hub_revision, self.args.hub_token)
        path = write_card(
            self.accelerator.unwrap_model(self.model),
            self.args.output_dir,
            repo_id or model_name or Path(self.args.output_dir).name,
            training=recipe_of(self),
            metrics=last_evaluation(self) | dict(metrics or {}),
            dataset=dataset,
            tags=[tags] if isinstance(tags, str) else tags,
            licence=license,
        )
        if theirs and CARD_MARK in path.read_text(encoding="utf-8"):
            path.write_text(theirs, encoding="utf-8")


class LossTerms:
    """Running sums of the fields `loss_*` and `reward_*` of outputs, on the device until the means are asked
    for."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.weights: dict[str, int] = {}

    def add(self, outputs: ModelOutput, weight: int = 1):
        for name, value in outputs.items():
            if name.startswith(("loss_", "reward_")):
                self.sums[name] = self.sums.get(name, 0) + value.detach().float().mean() * weight
                self.weights[name] = self.weights.get(name, 0) + weight

    def means(self) -> dict[str, float]:
        """Mean of each term over the batches of all processes that had it; starts anew."""
        names = list(self.sums)
        sums = torch.stack(list(self.sums.values())).tolist() if names else []
        sums_of_processes = gather_object(
            [dict(zip(names, zip(sums, self.weights.values(), strict=True), strict=True))]
        )
        self.sums, self.weights = {}, {}
        means = {}
        for name in dict.fromkeys(name for part in sums_of_processes for name in part):
            sums, weights = zip(*(part[name] for part in sums_of_processes if name in part), strict=True)
            means[name] = sum(sums) / sum(weights)
        return means


def _tell_failure(message: str, error: BaseException | None):
    if error is not None:
        logger.warning(f"{message}: not pushed, the Hub has what it had before ({error})")


def _without_augmentation(collator: Callable) -> Callable:
    if isinstance(collator, MixedCollator):
        return MixedCollator(**{kind: _without_augmentation(one) for kind, one in collator.collators.items()})
    return dataclasses.replace(collator, train=False) if isinstance(collator, Collator) else collator


def _split_off(optimizer: torch.optim.Optimizer, params: set[nn.Parameter], **settings: float):
    """Move `params` to groups of their own, which differ from those they were in by `settings`."""
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if p in params]
        if moved:
            group["params"] = [p for p in group["params"] if p not in params]
            optimizer.add_param_group({**group, "params": moved, **settings})
