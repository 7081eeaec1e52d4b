"""SOHO's pretraining: masked words, cells masked by their dictionary entry, and matching (arXiv 2104.03135,
section 3).

B: images, R = B * S texts, those of an image next to one another, L: text length, N: cells of an image, D:
hidden width, K: entries of the dictionary, V: vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_soho import SOHOConfig
from .modeling_soho import SOHOModel, SOHOPreTrainedModel, VisualTokens, images_of_texts
from .objectives import classification_loss, masked_lm_loss


@dataclass
class SOHOForPreTrainingOutput(ModelOutput):
    """Loss terms, each None where the batch has no labels for it, and the predictions.

    - mlm_logits (M, V) of the M words with a label, (R, L, V) without labels
    - itm_logits (R, 2), index 1: the text belongs to the image
    - mvm_logits (C, K) of the C masked cells, cosines with the entries, and mvm_labels (R, N), the entries to
      find there, -100 elsewhere; None where nothing may be masked
    """

    loss: Tensor | None = None
    loss_mlm: Tensor | None = None
    loss_mvm: Tensor | None = None
    loss_itm: Tensor | None = None
    mlm_logits: Tensor | None = None
    itm_logits: Tensor | None = None
    mvm_logits: Tensor | None = None
    mvm_labels: Tensor | None = None


class SOHOForPreTraining(SOHOPreTrainedModel):
    """SOHO with the objectives of pretraining: masked language modelling, masked visual modelling,
    matching."""

    auto_class = "AutoModelForPreTraining"

    def __init__(self, config: SOHOConfig):
        super().__init__(config)
        self.model = SOHOModel(config)
        self.visual_mask_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        self.itm_head = nn.Linear(config.hidden_size, 2, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, SOHOForPreTraining):
            init.normal_(module.visual_mask_embedding)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        mlm_input_ids: Tensor | None = None,
        mlm_labels: Tensor | None = None,
        itm_labels: Tensor | None = None,
        mvm_cells: Tensor | None = None,
        return_dict: bool = True,
    ) -> SOHOForPreTrainingOutput | tuple:
        """One step on images and S texts of each; without labels, the predictions.

        Args:
            pixel_values, pixel_mask: images (B, 3, H, W), and True where they are no padding (B, H, W).
            input_ids, attention_mask: texts (R, L), those of an image next to one another.
            mlm_input_ids: the texts with masked words, which are read in place of `input_ids`.
            mlm_labels: (R, L) the words there, -100 elsewhere.
            itm_labels: (R,) 1 where the text belongs to the image, 0 where not.
            mvm_cells: (R,) a cell of each image, all cells of whose entry are masked, -1 for none. Drawn by
                `config.mvm_prob` in training, and nothing is masked in evaluation, without it.

        Raises:
            ValueError: no texts, or a number of texts that does not fit the images.
        """
        input_ids = input_ids if mlm_input_ids is None else mlm_input_ids
        if input_ids is None:
            raise ValueError("input_ids and mlm_input_ids are both None; give texts")
        index = images_of_texts(len(pixel_values), input_ids, None)
        images = self.model.get_image_features(pixel_values, pixel_mask, len(input_ids) // len(pixel_values))
        images = images.select(index)
        mvm_labels = self.mask_cells(images, mvm_cells)
        if mvm_labels is not None and itm_labels is not None and not self.config.mvm_on_mismatched:
            mvm_labels = mvm_labels.masked_fill(itm_labels[:, None] == 0, -100)
        states = self.model.fuse(input_ids, attention_mask, images)
        output = SOHOForPreTrainingOutput(
            itm_logits=self.itm_head(states.last_hidden_state[:, 0]), mvm_labels=mvm_labels
        )
        self._predict_words(output, states.last_hidden_state, mlm_labels)
        if mvm_labels is not None:
            self._predict_entries(output, states.image_hidden_state)
        if itm_labels is not None:
            output.loss_itm = classification_loss(output.itm_logits, itm_labels)
        terms = [
            getattr(self.config, f"{name}_weight") * output[f"loss_{name}"]
            for name in ("mlm", "mvm", "itm")
            if output.get(f"loss_{name}") is not None
        ]
        output.loss = sum(terms) if itm_labels is not None or mlm_labels is not None else None
        return output if return_dict else output.to_tuple()

    def mask_cells(self, images: VisualTokens, cells: Tensor | None = None) -> Tensor | None:
        """Mask the tokens of R images in place; the entry of every masked cell (R, N), -100 elsewhere.

        `cells` as `mvm_cells` of `forward`. None without a dictionary, or where nothing is to be masked.
        """
        if images.entries is None or (cells is None and not self.training):
            return None
        entries = images.entries.masked_fill(~images.mask.flatten(1), -100)
        cells = self._pick_cells(entries) if cells is None else cells
        picked = entries.gather(1, cells.clamp(min=0)[:, None])  # (R, 1)
        masked = (entries == picked) & (picked != -100) & (cells >= 0)[:, None]
        embedding = self.visual_mask_embedding.to(images.states.dtype)
        images.states = torch.where(masked[..., None], embedding, images.states)
        return entries.masked_fill(~masked, -100)

    def _pick_cells(self, entries: Tensor) -> Tensor:
        """A cell (R,) of each row of entries (R, N), -100 on padding, by `config.mvm_pick`, -1 for none."""
        rows, number = entries.shape
        if self.config.mvm_pick == "location":
            cells = torch.randint(number, (1,), device=entries.device)
        else:  # the cell whose entry comes first in a random order of all entries
            order = torch.rand(rows, self.config.vd_size, device=entries.device)
            cells = order.gather(1, entries.clamp(min=0)).masked_fill(entries == -100, -1).argmax(dim=1)
        chosen = torch.rand(rows, device=entries.device) < self.config.mvm_prob
        return torch.where(chosen, cells, -1)

    def _predict_words(self, output: SOHOForPreTrainingOutput, words: Tensor, labels: Tensor | None):
        vocabulary = self.get_input_embeddings().weight  # tied, without bias
        if labels is None:
            output.mlm_logits = F.linear(words, vocabulary)
            return
        labelled = labels != -100
        output.mlm_logits = F.linear(words[labelled], vocabulary)  # only where a label asks
        output.loss_mlm = masked_lm_loss(output.mlm_logits, labels[labelled])

    def _predict_entries(self, output: SOHOForPreTrainingOutput, cells: Tensor):
        masked = output.mvm_labels != -100
        entries = F.normalize(self.model.visual_dictionary.embeddings, dim=-1).to(cells.dtype)
        output.mvm_logits = F.normalize(cells[masked], dim=-1) @ entries.T  # (C, K)
        output.loss_mvm = masked_lm_loss(output.mvm_logits, output.mvm_labels[masked])

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.model.set_input_embeddings(value)
