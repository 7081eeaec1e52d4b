"""Schedules beside that of the learning rate."""

from collections.abc import Sequence

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
