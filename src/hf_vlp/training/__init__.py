"""Training with the Trainer of transformers: its subclass, its arguments, the papers' recipes."""

from .arguments import VLPTrainingArguments
from .checkpoints import last_complete_checkpoint
from .optimizers import BertAdam, OfficialAdamW, SGDAdamW
from .recipes import RECIPES, recipe
from .self_critical import SelfCriticalTrainer
from .trainer import VLPTrainer

__all__ = [
    "RECIPES",
    "BertAdam",
    "OfficialAdamW",
    "SGDAdamW",
    "SelfCriticalTrainer",
    "VLPTrainer",
    "VLPTrainingArguments",
    "last_complete_checkpoint",
    "recipe",
]
