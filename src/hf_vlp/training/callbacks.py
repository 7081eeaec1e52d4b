"""Schedules beside that of the learning rate."""

from collections.abc import Sequence

from torch import nn
from transformers import TrainerCallback


class AlphaRamp(TrainerCallback):
    """Raises the weight of a teacher's soft targets from 0 to `config.alpha` over the first `epochs`.

    It depends on the position in the training alone, so that a resumed run goes on where it was. ALBEF
    section 3; the official code ramps over the first epoch.
    """

    def __init__(self, epochs: float):
        self.epochs = epochs

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model.distillation_weight = model.config.alpha * min(1.0, state.epoch / self.epochs)


class AnswerLossWeights(TrainerCallback):
    """Sets the weight of the answer loss in each epoch; the last one holds for all later epochs.

    LXMERT's paper trains its first ten epochs without the answers (section 3.3).
    """

    def __init__(self, weights: Sequence[float]):
        self.weights = weights

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model.answer_weight = self.weights[min(int(state.epoch), len(self.weights) - 1)]


class TrunkFreeze(TrainerCallback):
    """Keeps the CNN of a model as it is for the first `epochs`, its batch normalisation included; then those
    of its parameters train that could be trained before. SOHO's paper does so for ten epochs, until words and
    dictionary have settled.

    It depends on the position in the training alone. Parameters are frozen after the model is wrapped, so
    that several processes share the gradients of those that thaw.
    """

    def __init__(self, epochs: float):
        self.epochs = epochs
        self.parameters, self.hook = [], None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.epoch >= self.epochs:
            self._thaw()
        elif self.hook is None:
            self._freeze(trunk_of(model))

    def on_train_end(self, args, state, control, **kwargs):
        self._thaw()

    def _freeze(self, trunk: nn.Module):
        self.parameters = [p for p in trunk.parameters() if p.requires_grad]
        for parameter in self.parameters:
            parameter.requires_grad_(False)
        # The Trainer puts the whole model into training mode in each step.
        self.hook = trunk.register_forward_pre_hook(_put_in_evaluation_mode)

    def _thaw(self):
        if self.hook is not None:
            self.hook.remove()
            self.hook = None
            for parameter in self.parameters:
                parameter.requires_grad_(True)


def _put_in_evaluation_mode(module: nn.Module, inputs: tuple):
    module.eval()


def trunk_of(model: nn.Module) -> nn.Module | None:
    """The CNN that a model trains end to end, `backbone` of its base model; None for models without one."""
    return getattr(getattr(model, "base_model", model), "backbone", None)
