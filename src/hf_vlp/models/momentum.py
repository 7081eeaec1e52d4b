"""A teacher that follows its student, and queues of the features that it made (ALBEF section 3).

K: size of a queue, P: projection width, G: pairs of all processes.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import logging

from .backbones import resize_trunk
from .base import VLPPreTrainedModel
from .distributed import gather_rows

logger = logging.get_logger(__name__)

UNKNOWN_ID = -100  # id of a feature that came without one; as in the official code


class MomentumTeacher(nn.Module):
    """A slow copy of `modules`, never trained, whose parameters follow theirs by moving average."""

    def __init__(self, **modules: nn.Module):
        super().__init__()
        for name, module in modules.items():
            configs = [part.config for part in module.modules() if hasattr(part, "config")]
            self.add_module(name, copy.deepcopy(module, {id(config): config for config in configs}))

    @torch.no_grad()
    def follow(self, student: nn.Module, momentum: float):
        """slow = momentum * slow + (1 - momentum) * fast, for every parameter in one fused update."""
        names, slow = zip(*self.named_parameters(), strict=True)
        torch._foreach_lerp_(slow, [student.get_parameter(name) for name in names], 1 - momentum)


class FeatureQueue(nn.Module):
    """The last K image and text features (K, P) of the teacher, and with `holds_ids` the ids of their images.

    Random unit vectors until they are filled, the same in every process. `pointer` is the next row to write.
    """

    def __init__(self, size: int, width: int, holds_ids: bool = False):
        super().__init__()
        for name, value in self.initial_values(size, width, holds_ids).items():
            self.register_buffer(name, value)

    @staticmethod
    def initial_values(size: int, width: int, holds_ids: bool) -> dict[str, Tensor]:
        generator = torch.Generator("cpu").manual_seed(0)
        random = torch.randn(2, size, width, generator=generator, dtype=torch.float32, device="cpu")
        image_features, text_features = F.normalize(random, dim=-1).to(torch.get_default_dtype()).unbind()
        ids = {"image_ids": torch.full((size,), UNKNOWN_ID, device="cpu")} if holds_ids else {}
        pointer = torch.zeros((), dtype=torch.long, device="cpu")
        return {"image_features": image_features, "text_features": text_features, "pointer": pointer, **ids}

    @torch.no_grad()
    def reset(self):
        """Empty the queue."""
        holds_ids = "image_ids" in dict(self.named_buffers())
        for name, value in self.initial_values(*self.image_features.shape, holds_ids).items():
            init.copy_(getattr(self, name), value)

    @torch.no_grad()
    def push(self, **rows: Tensor):
        """Put the rows of all processes, named like the buffers, in place of the oldest ones.

        The number of rows need not divide K. Old rows stay as they are in tensors that a graph holds.
        """
        size = len(self.image_features)
        gathered = {name: gather_rows(values)[-size:] for name, values in rows.items()}
        count = len(gathered["image_features"])
        slots = (self.pointer + torch.arange(count, device=self.pointer.device)) % size
        for name, values in gathered.items():
            old = getattr(self, name)
            setattr(self, name, old.index_copy(0, slots, values.to(old.dtype)))
        self.pointer = (self.pointer + count) % size


class LearnsFromTeacher(VLPPreTrainedModel):
    """A head with a momentum teacher, and queues where it contrasts, as long as `config.momentum_teacher`.

    What `save_pretrained` and `push_to_hub` write is for inference and holds neither; `keep_teacher=True`
    writes both, to go on with pretraining, as the checkpoints of the Trainer do. A teacher that a checkpoint
    lacks starts as a copy of its student. `distillation_weight` is the weight of the soft targets now,
    `config.alpha` unless a schedule changes it.
    """

    _keys_to_ignore_on_load_unexpected = [r"^(teacher|queue)\."]

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.distillation_weight = float(config.alpha)
        self.teacher = self.queue = None

    def add_teacher(self, *names: str, holds_ids: bool | None = None):
        """Make the teacher of the modules `names`, and with `holds_ids` given a queue; the last step of
        `__init__`."""
        if self.config.momentum_teacher:
            tied = self.get_expanded_tied_weights_keys(all_submodels=True)
            self.teacher = MomentumTeacher(**{name: self.get_submodule(name) for name in names})
            self.teacher.model.temperature = None  # it compares with its student's
            in_teacher = {f"teacher.{target}": f"teacher.{source}" for target, source in tied.items()}
            self._tied_weights_keys = (self._tied_weights_keys or {}) | in_teacher
            if holds_ids is not None:
                self.queue = FeatureQueue(self.config.queue_size, self.config.projection_dim, holds_ids)
                # DDP would send them at every step, though all processes write the same
                self._ddp_params_and_buffers_to_ignore = [f"queue.{n}" for n, _ in self.queue.named_buffers()]
        self.post_init()
        self.copy_to_teacher()

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, FeatureQueue):
            module.reset()

    def tie_weights(self, *args, **kwargs):
        super().tie_weights(*args, **kwargs)
        if self.teacher is not None:
            self.teacher.requires_grad_(False)  # loading makes new parameters

    def fill_from_twins(self, missing: set[str]):
        super().fill_from_twins(missing)
        self.copy_to_teacher([name for name in missing if name.startswith("teacher.")])
        missing -= {name for name in missing if name.startswith(("teacher.", "queue."))}

    @torch.no_grad()
    def copy_to_teacher(self, names: list[str] | None = None):
        """Set parameters of the teacher, all without `names`, to those of the student."""
        if self.teacher is not None:
            names = (
                [f"teacher.{name}" for name, _ in self.teacher.named_parameters()] if names is None else names
            )
            for name in names:
                self.get_parameter(name).copy_(self.get_parameter(name.removeprefix("teacher.")))

    def lead_teacher(self) -> MomentumTeacher | None:
        """The teacher for this step, one step further while training; None if it has no say."""
        if self.teacher is None:
            if self.training and self.distillation_weight:
                logger.warning_once(
                    "config.momentum_teacher is False: the model is trained without a teacher; load it with "
                    "from_pretrained(..., momentum_teacher=True) to learn from one"
                )
            return None
        if self.training:
            self.teacher.follow(self, self.config.momentum)
        return self.teacher

    @torch.no_grad()
    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        """As in transformers; also of the teacher, whose new words start as those of its student."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        for name, layer in [] if self.teacher is None else list(self.teacher.named_modules()):
            if isinstance(layer, (nn.Embedding, nn.Linear)):
                student = self.get_submodule(name)
                if student.weight.shape != layer.weight.shape:
                    resized = copy.deepcopy(student).requires_grad_(False)
                    for new, old in zip(resized.parameters(), layer.parameters(), strict=True):
                        kept = min(len(new), len(old))
                        new[:kept] = old[:kept]
                    self.teacher.set_submodule(name, resized)
        self.tie_weights()
        return embeddings

    def set_image_size(self, image_size: int):
        super().set_image_size(image_size)
        if self.teacher is not None:
            trunk = resize_trunk(self.teacher.model.vision_model, image_size).to(self.device, self.dtype)
            self.teacher.model.vision_model = trunk.train(self.training).requires_grad_(False)

    def save_pretrained(
        self, save_directory, *args, keep_teacher: bool = False, state_dict: dict | None = None, **kwargs
    ):
        """As in transformers; without the teacher and the queues, unless `keep_teacher` or for a checkpoint
        of the Trainer."""
        if self.teacher is None or keep_teacher or not self.saves_code:
            return super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)
        state_dict = self.state_dict() if state_dict is None else state_dict
        kept = {k: v for k, v in state_dict.items() if not k.startswith(("teacher.", "queue."))}
        self.config.momentum_teacher = False
        try:
            return super().save_pretrained(save_directory, *args, state_dict=kept, **kwargs)
        finally:
            self.config.momentum_teacher = True
