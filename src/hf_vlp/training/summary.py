"""What a model card tells of a training."""

from typing import Any

from transformers import Trainer

_NO_METRICS = ("runtime", "per_second", "preparation_time")


def recipe_of(trainer: Trainer) -> dict[str, Any]:
    """Names and values of what was done, as far as the trainer has come."""
    args, state = trainer.args, trainer.state
    times = args.new_parameter_lr_multiplier
    recipe = {
        "steps": state.global_step,
        "epochs": round(state.epoch or 0, 2),
        "rows": len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else None,
        "rows of a step": args.train_batch_size * args.world_size * args.gradient_accumulation_steps,
        "learning rate": args.learning_rate,
        "learning rate of new parameters": args.learning_rate * times if times != 1 else None,
        "optimizer": _optimizer(args),
        "weight decay": args.weight_decay,
        "schedule": args.lr_milestones or getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type),
        "warm-up": args.warmup_steps or None,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "float32",
        "seed": args.seed,
        "teacher's ramp in epochs": args.alpha_ramp_epochs or None,
    }
    terms = {name: value for logs in state.log_history for name, value in logs.items() if "loss" in name}
    terms = {name: value for name, value in terms.items() if not name.startswith(("eval", "train"))}
    recipe |= {f"last {name}": f"{value:.4g}" for name, value in terms.items()}
    return {name: value for name, value in recipe.items() if value is not None}


def last_evaluation(trainer: Trainer) -> dict[str, float]:
    """Metrics of the last evaluation, without those of its speed."""
    evaluations = [
        logs for logs in trainer.state.log_history if "eval_loss" in logs or "eval_runtime" in logs
    ]
    return {
        name.removeprefix("eval_"): value
        for name, value in (evaluations or [{}])[-1].items()
        if name.startswith("eval_") and not name.endswith(_NO_METRICS)
    }


def _optimizer(args) -> str:
    official = {"OfficialAdamW": args.official_adamw, "BertAdam": args.bert_adam, "SGDAdamW": args.sgd_adamw}
    chosen = [name for name, is_chosen in official.items() if is_chosen]
    return chosen[0] if chosen else str(getattr(args.optim, "value", args.optim))
