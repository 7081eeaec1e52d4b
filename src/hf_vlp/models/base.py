"""What every model of the package has in common: initialisation, loading, and saving with its own code."""

import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

from .backbones import resize_trunk
from .hub import SharedOnHub, refuse_pickle


class CarriesCode:
    """A class whose saved folder names its code only while it is written, by
    `VLPPreTrainedModel.save_pretrained`."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str | None = None):
        """Do nothing: transformers calls this on loading, and would write half of what a folder needs."""


class Projection(nn.Linear):
    """A linear layer that keeps torch's own initialisation, as the official heads do."""


class VLPPreTrainedModel(SharedOnHub, CarriesCode, PreTrainedModel):
    """Base class of all models.

    `new_parameters` names the parameters that the checkpoint a model was started from did not hold; the
    papers give them a higher learning rate.
    """

    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    auto_class = "AutoModel"  # the Auto class that stands for this head
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # losses are means over the micro-batch, so the Trainer has to divide
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["BertEmbeddings", "BertLayer"]
    # for peft: the linear layers of attention and feed-forward blocks, of image and text, but no teacher's
    LORA_TARGET_MODULES = (
        r"(?!teacher\.)(?:.+\.)?\w*(?:layers?|key_values|blocks)\.\d+\.(?:.+\.)?"
        r"(?:query|key|value|dense|[qkvo]_proj|out_proj|qkv|proj|fc[12])"
    )
    # what a parameter that a checkpoint lacks is copied from: pattern of its name, and the name of its twin
    _twins: dict[str, str] = {}
    replaced_on_push = ("model*.safetensors", "model.safetensors.index.json")

    def __init__(self, config, *args, **kwargs):
        _check_model_type(type(self), config.model_type)
        super().__init__(config, *args, **kwargs)
        self.new_parameters: frozenset[str] = frozenset()
        self.saves_code = True  # the Trainer keeps its checkpoints plain

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, Projection):
            module.reset_parameters()

    @classmethod
    def from_pretrained(
        cls, *args, output_loading_info: bool = False, image_size: int | None = None, **kwargs
    ):
        """Load as in transformers, then `set_image_size(image_size)` where it is given.

        Weights are read from safetensors alone.

        Raises:
            ValueError: weights in a pickle, the config of another model, or a size that does not fit.
        """
        for switch in ("use_safetensors", "weights_only"):
            if kwargs.setdefault(switch, True) is not True:
                raise ValueError(
                    f"{switch} is {kwargs[switch]}, but weights in pickles are not loaded; leave it out"
                )
        try:
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        except Exception as error:
            cls._explain(error, *args, **kwargs)
            raise
        model.new_parameters = frozenset(info["missing_keys"])
        if image_size is not None:
            model.set_image_size(image_size)
        return (model, info) if output_loading_info else model

    @classmethod
    def _explain(cls, error: Exception, name=None, *args, config=None, subfolder: str = "", **kwargs):
        """Raise a clearer error than transformers does where one is known."""
        if name is None:
            return
        hub = ("revision", "token", "cache_dir", "local_files_only")
        where = {option: kwargs[option] for option in hub if option in kwargs}
        try:
            saved = {}
            if config is None:
                saved, _ = PreTrainedConfig.get_config_dict(name, subfolder=subfolder, **where)
            own = cls.config_class.model_type
            model_type = saved.get("model_type", own)
            if model_type != own.removeprefix("vlp_"):  # transformers' own LXMERT is read
                _check_model_type(cls, model_type)
            if isinstance(error, OSError):
                refuse_pickle(name, subfolder, **where)
            if isinstance(error, SafetensorError):
                raise ValueError(
                    f"{name} holds weights that are cut short or are no safetensors ({error}); fetch them "
                    "again with force_download=True, or ask their author"
                )
        except OSError:
            return  # it cannot be reached, as `error` says
        except ValueError as clearer:
            raise clearer from error

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs):
        """As in transformers, behind the last gate: an index or a config may name files of any kind."""
        for file in checkpoint_files or ():
            if not str(file).endswith(".safetensors"):
                raise ValueError(f"{file} is no safetensors, and other weights are not loaded; convert them")
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

    def tie_weights(self, missing_keys: set[str] | None = None, **kwargs):
        """As in transformers, which calls it after loading; what is missing is taken from its twin first."""
        if missing_keys:
            tied = missing_keys & set(self.all_tied_weights_keys)  # not there yet
            missing_keys -= tied
            self.fill_from_twins(missing_keys)
            missing_keys |= tied
        super().tie_weights(missing_keys=missing_keys, **kwargs)

    @torch.no_grad()
    def fill_from_twins(self, missing: set[str]):
        """Copy parameters that a checkpoint lacked from those it held, and take them out of `missing`.

        A layer is copied whole or, where one of its parameters has no twin of its shape, not at all.
        """
        state = self.state_dict()
        for pattern, twin in self._twins.items():
            sources = {name: re.sub(pattern, twin, name) for name in missing if re.search(pattern, name)}
            unlike = {
                name.rpartition(".")[0]
                for name, source in sources.items()
                if source not in state or source in missing or state[source].shape != state[name].shape
            }
            for name, source in sources.items():
                if name.rpartition(".")[0] not in unlike:
                    state[name].copy_(state[source])
                    missing.discard(name)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        """As in transformers; to as many words also a decoder, whose embeddings are its own."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        decoder = getattr(self, "decoder", None)
        if isinstance(decoder, VLPPreTrainedModel):
            decoder.resize_token_embeddings(embeddings.num_embeddings)
        return embeddings

    def set_image_size(self, image_size: int):
        """Resample the trunk's position tables for images of `image_size` pixels a side.

        Raises:
            ValueError: the trunk's patches or windows do not fit the size.
        """
        base = self.base_model
        base.vision_model = resize_trunk(base.vision_model, image_size).to(self.device, self.dtype)
        base.vision_model.train(self.training)
        self.config.vision_config = base.config.vision_config = base.vision_model.config

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs):
        """Save as in transformers, with the code that `trust_remote_code=True` loads without this package."""
        # live names: a resumed Trainer reads the file as it is
        kwargs.setdefault("save_original_format", False)
        kwargs.update(is_main_process=is_main_process)
        if not self.saves_code:
            return super().save_pretrained(save_directory, **kwargs)
        self.config.auto_map = self._auto_map()
        try:
            if is_main_process:
                self.save_code(save_directory)
            return super().save_pretrained(save_directory, **kwargs)
        finally:
            del self.config.auto_map

    def save_code(self, directory: str | Path):
        """Copy the modeling file and the sibling files it imports into `directory`."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        modeling_file = sys.modules[type(self).__module__].__file__
        for file in {modeling_file, *get_relative_import_files(modeling_file)}:
            shutil.copyfile(file, directory / Path(file).name)

    def _auto_map(self) -> dict[str, str]:
        module = type(self).__module__.split(".")[-1]
        head = f"{module}.{type(self).__name__}"
        return {
            "AutoConfig": f"{module}.{type(self.config).__name__}",
            "AutoModel": head,
            self.auto_class: head,
        }


def _check_model_type(model_class: type[PreTrainedModel], model_type: str):
    own = getattr(model_class.config_class, "model_type", model_type)
    if model_type != own:
        raise ValueError(
            f"the config has model_type={model_type!r}, but {model_class.__name__} is {own!r}; load it with "
            "the classes of its own model"
        )
