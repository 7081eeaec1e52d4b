"""X-VLM's captioning (arXiv 2111.08276, section 4): text and fusion layers read as one decoder.

B: images, R: captions, S: image tokens, L: text length, D: text width, M: labelled words, V: vocabulary.
"""

import torch
from torch import Tensor
from transformers import DynamicCache

from .backbones import ImageTrunk
from .beam_search import official_beam_search
from .checks import check_index
from .configuration_xvlm import XVLMConfig
from .layers_bert import TextDecoder
from .modeling_xvlm import XVLMPreTrainedModel
from .objectives import smoothed_losses
from .outputs import VLPForCaptioningOutput

MAX_LENGTH = 20  # of a caption with its prompt


class XVLMForCaptioning(XVLMPreTrainedModel):
    """X-VLM that writes captions: each word attends to the words before it, and in the fusion layers to the
    image."""

    auto_class = "AutoModelForCaptioning"
    _pretrained_keys = {
        r"^model\.vision_model\.": "vision_model.",
        r"^(?:model\.)?text_model\.embeddings\.": "decoder.embeddings.",
        r"^(?:model\.)?text_model\.layer\.": "decoder.plain_layer.",
        r"^(?:model\.)?fusion_model\.layer\.": "decoder.layer.",
        r"^(?:model\.)?fusion_model\.image_key_values\.": "decoder.key_values.",
        r"^lm_head\.": "decoder.lm_head.",
    }

    def __init__(self, config: XVLMConfig):
        super().__init__(config)
        text = config.text_config
        self.vision_model = ImageTrunk(config.vision_config)
        self.decoder = TextDecoder(
            text, self.vision_model.width, text.num_fusion_layers, num_plain_layers=text.num_text_layers
        )
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Load as in transformers; text layers, fusion layers and language-modelling head of a pretrained
        model become the decoder."""
        kwargs.setdefault("key_mapping", cls._pretrained_keys)
        return super().from_pretrained(*args, **kwargs)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.decoder.get_input_embeddings()

    def set_input_embeddings(self, value: torch.nn.Module):
        self.decoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.decoder.get_output_embeddings()

    def set_output_embeddings(self, value: torch.nn.Module):
        self.decoder.set_output_embeddings(value)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        image_index: Tensor | None = None,
        return_dict: bool = True,
    ) -> VLPForCaptioningOutput | tuple:
        """The words after those of captions (R, L), `[CLS] prompt words [SEP]`; with labels the loss.

        Args:
            pixel_values: images (B, 3, size, size).
            input_ids: captions. R is B, or a multiple of it with the captions of each image next to one
                another, which share its keys and values.
            attention_mask: (R, L), not needed: padding is on the right, and no word sees those after it.
            labels: (R, L), `input_ids` where they are to be learnt, -100 for prompt and padding.
            image_index: the image of each caption (R,), if they come in another order.

        Raises:
            ValueError: captions that do not fit the images, or labels that do not fit the captions.
        """
        image_embeds = self.vision_model(pixel_values)
        context = self.decoder.read_context(image_embeds)
        if image_index is not None:
            check_index(image_index, len(pixel_values))
            context = context.select(image_index)
        _check_captions(len(context.key_values[0][0]), input_ids, labels)
        if labels is None:
            output = VLPForCaptioningOutput(
                lm_logits=self.decoder.lm_head(self.decoder.decode(input_ids, context))
            )
            return output if return_dict else output.to_tuple()

        states, next_words = self.decoder.decode(input_ids[:, :-1], context), labels[:, 1:]
        labelled = next_words != -100
        logits = self.decoder.lm_head(states[labelled])  # vocabulary logits only where a label asks
        plain, smoothed = smoothed_losses(logits, next_words[labelled], self.config.label_smoothing)
        caption_of_word = labelled.nonzero()[:, 0]
        sums = plain.new_zeros(len(labels)).index_add(0, caption_of_word, plain)
        output = VLPForCaptioningOutput(
            loss=smoothed.sum() / labelled.sum().clamp(min=1),
            lm_logits=logits,
            caption_losses=sums / labelled.sum(dim=1).clamp(min=1),
        )
        return output if return_dict else output.to_tuple()

    def generate(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        official_length: bool = False,
        **generation_kwargs,
    ) -> Tensor:
        """Write captions of images (B, 3, size, size): ids (B, L) from [CLS] on, prompt included.

        Keys and values of an image are projected once, for all its beams or samples and every step.

        Args:
            input_ids: the prompt (B, L), or one for all (1, L), `[CLS] a picture of` where the model learnt
                with it; [CLS] alone without it. All of one length.
            attention_mask: not needed.
            official_length: choose among beams as the official code does, by the mean log-probability over
                the words of prompt and caption, [SEP] counted in the sum only. transformers divides by the
                number of new words.
            generation_kwargs: those of transformers' `generate` (`num_beams`, `do_sample`, `min_length`,
                ...). Without `max_new_tokens` a caption has 20 words at most, those of the prompt included.

        Raises:
            ValueError: the config does not tell which ids captions begin and end with, prompts that do not
                fit the images, or `official_length` without beams.
        """
        starts = self.decoder.first_words(len(pixel_values)) if input_ids is None else input_ids
        if len(starts) not in (1, len(pixel_values)):
            raise ValueError(
                f"input_ids has {len(starts)} prompts for {len(pixel_values)} images; give one for each, or "
                "one for all"
            )
        settings = {name: getattr(self.decoder.config, name) for name in ("eos_token_id", "pad_token_id")}
        if "max_new_tokens" not in generation_kwargs:
            settings["max_length"] = MAX_LENGTH
        if official_length:
            settings["custom_generate"] = official_beam_search
        with torch.no_grad():
            context = self.decoder.read_context(self.vision_model(pixel_values))
        return self.decoder.generate(
            starts.expand(len(pixel_values), -1),
            context=context,
            past_key_values=DynamicCache(),
            **settings | generation_kwargs,
        )


def _check_captions(images: int, input_ids: Tensor, labels: Tensor | None):
    if len(input_ids) % images:
        raise ValueError(
            f"input_ids has {len(input_ids)} captions for {images} images; give as many for each, or tell "
            "the image of each caption with image_index"
        )
    if labels is not None and labels.shape != input_ids.shape:
        raise ValueError(
            f"labels is {tuple(labels.shape)} and input_ids {tuple(input_ids.shape)}; give a label for each "
            "word, -100 for none"
        )
