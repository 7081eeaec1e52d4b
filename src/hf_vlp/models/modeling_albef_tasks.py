"""ALBEF's heads for question answering, visual entailment and pair reasoning (arXiv 2107.07651, section 5).

B: images, R: texts, L: text length, D: text width, A: answers, V: vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import SequenceClassifierOutput

from .base import Projection
from .checks import check_index, check_pairs
from .configuration_albef import ALBEFConfig
from .image_text import ImageTextHead, VisualConcepts, all_ones
from .layers_bert import Context, KeyValues, Packing, TextDecoder
from .modeling_albef import ALBEFHead, ALBEFModel, ALBEFPreTrainedModel
from .negatives import draw_by_softmax
from .objectives import distilled_cross_entropy
from .outputs import RankedAnswers, VLPForQuestionAnsweringOutput

ROWS_PER_CALL = 2048  # words whose vocabulary logits are held at a time


class ALBEFForQuestionAnswering(ALBEFHead):
    """ALBEF that writes or ranks answers: a decoder attends to the question fused with the image."""

    auto_class = "AutoModelForVisualQuestionAnswering"
    _twins = {  # the decoder starts as the fusion layers, without the image
        r"^(|teacher\.)decoder\.embeddings\.": r"\1model.text_model.embeddings.",
        r"^(|teacher\.)decoder\.layer\.": r"\1model.fusion_model.layer.",
        r"^(|teacher\.)decoder\.key_values\.": r"\1model.fusion_model.image_key_values.",
    }

    def __init__(self, config: ALBEFConfig):
        super().__init__(config)
        self.model = ALBEFModel(config, add_projections=False)
        self.decoder = TextDecoder(config.text_config, config.text_config.hidden_size)
        self.add_teacher("model", "decoder")

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Load as in transformers; the masked-language-modelling head of a pretrained model becomes the
        decoder's."""
        kwargs.setdefault("key_mapping", {r"^(|teacher\.)lm_head\.": r"\1decoder.lm_head."})
        return super().from_pretrained(*args, **kwargs)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        answer_input_ids: Tensor | None = None,
        answer_attention_mask: Tensor | None = None,
        answer_question_index: Tensor | None = None,
        answer_weights: Tensor | None = None,
        image_index: Tensor | None = None,
        return_dict: bool = True,
    ) -> VLPForQuestionAnsweringOutput | tuple:
        """The loss of given answers (A, L'), `[CLS] words [SEP]`, to questions (R, L) about images.

        Args:
            pixel_values: images (B, 3, size, size).
            input_ids, attention_mask: questions (R, L), question r about image r, or with `image_index` (R,)
                about that image, which is encoded once.
            answer_input_ids, answer_attention_mask: answers (A, L').
            answer_question_index: the question of each answer (A,); without it answer a is to question a.
            answer_weights: (A,), 1 without it.

        Raises:
            ValueError: questions do not fit the images, or answers the questions.
        """
        if answer_input_ids is None:
            raise ValueError("answer_input_ids is None; give answers, or use rank_answers() or generate()")
        index, weights = _check_answers(
            answer_input_ids, answer_question_index, answer_weights, len(input_ids)
        )
        if answer_attention_mask is None:
            answer_attention_mask = all_ones(answer_input_ids)
        questions = (pixel_values, input_ids, attention_mask, image_index)
        labelled, labels = answer_attention_mask[:, 1:].bool(), answer_input_ids[:, 1:]

        teacher, teacher_logits = self.lead_teacher(), None
        if teacher is not None and self.distillation_weight:
            with torch.no_grad():
                teacher_logits = _answer_logits(teacher, questions, answer_input_ids, labelled, index)
        logits = _answer_logits(self, questions, answer_input_ids, labelled, index)
        of_words = distilled_cross_entropy(logits, labels[labelled], teacher_logits, self.distillation_weight)
        answer_of_word = labelled.nonzero()[:, 0]
        losses = of_words.new_zeros(len(labels)).index_add(0, answer_of_word, of_words)  # (A,)
        output = VLPForQuestionAnsweringOutput(
            loss=(weights * losses).sum() / len(input_ids), answer_losses=losses
        )
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def rank_answers(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        answer_input_ids: Tensor,
        answer_attention_mask: Tensor,
        top_k: int = 128,
        image_index: Tensor | None = None,
    ) -> RankedAnswers:
        """Rank a list of answers (A, L') for each question (R, L) about an image. ALBEF section 5.

        The `top_k` answers whose first word is the most probable are scored whole; their log-probabilities
        are the scores, in which the first word counts twice by `config.count_first_token_twice`.

        Every answer to a question attends to the same keys and values of it; [CLS] is read once for
        all answers, and padding costs nothing.

        Raises:
            ValueError: `top_k` below 1, or questions that do not fit the images.
        """
        context = _read_questions(self, pixel_values, input_ids, attention_mask, image_index)
        return self.rank_in_context(context, answer_input_ids, answer_attention_mask, top_k)

    @torch.no_grad()
    def rank_in_context(
        self, context: Context, answer_input_ids: Tensor, answer_attention_mask: Tensor, top_k: int
    ) -> RankedAnswers:
        """`rank_answers` for R questions that were read: the decoder's part of the work."""
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; use a number of answers of at least 1")
        questions, top_k = len(context.key_values[0][0]), min(top_k, len(answer_input_ids))
        decoder, cache = self.decoder, DynamicCache()
        starts = answer_input_ids[:1, :1].expand(questions, 1)
        first_logits = decoder.lm_head(decoder.decode(starts, context, cache)[:, 0]).float()  # (R, V)
        candidates = first_logits.softmax(dim=1)[:, answer_input_ids[:, 1]].topk(top_k, dim=1).indices
        first_words = answer_input_ids[:, 1][candidates]  # (R, k)

        scores = first_logits.log_softmax(dim=1).gather(1, first_words)
        if self.config.count_first_token_twice:
            scores = 2 * scores
        cache.batch_repeat_interleave(top_k)
        words = answer_input_ids[candidates.flatten()]  # (R * k, L')
        is_next = answer_attention_mask[candidates.flatten(), 2:].bool()
        is_next = is_next[:, : int(is_next.sum(dim=1).max())]
        length = is_next.shape[1]
        packing = Packing.of(is_next)
        states = decoder.decode(words[:, 1 : 1 + length], context, cache, packing)[0]  # (N, D)
        log_probabilities = _log_probabilities(decoder.lm_head, states, words[:, 2 : 2 + length][is_next])
        answer_of_word = is_next.nonzero()[:, 0]
        scores = scores.flatten().index_add(0, answer_of_word, log_probabilities).view(questions, top_k)

        probabilities, order = scores.softmax(dim=1).topk(top_k, dim=1)
        return RankedAnswers(indices=candidates.gather(1, order), probabilities=probabilities)

    def generate(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_index: Tensor | None = None,
        **generation_kwargs,
    ) -> Tensor:
        """Write answers to questions (R, L) about images: ids (R, L') from [CLS] on.

        `generation_kwargs` are those of transformers' `generate` (`num_beams`, `do_sample`, ...); without
        `max_new_tokens` an answer has 10 words at most. All beams share the keys and values of a question.

        Raises:
            ValueError: the config does not tell which ids answers begin and end with.
        """
        starts = self.decoder.first_words(len(input_ids))
        with torch.no_grad():
            context = _read_questions(self, pixel_values, input_ids, attention_mask, image_index)
        settings = {"max_new_tokens": 10, **generation_kwargs}
        return self.decoder.generate(starts, context=context, past_key_values=DynamicCache(), **settings)


def _read_questions(
    part: nn.Module,
    pixel_values: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    image_index: Tensor | None,
) -> Context:
    """What the decoder of `part`, the model or its teacher, attends to: the fused questions (R, L, D)."""
    attention_mask = all_ones(input_ids) if attention_mask is None else attention_mask
    images = _images_of_texts(part.model, pixel_values, input_ids, image_index)
    fused = part.model.fuse(
        part.model.text_model(input_ids, attention_mask), attention_mask, images.key_values
    )
    return part.decoder.read_context(fused, attention_mask)


def _answer_logits(
    part: nn.Module, questions: tuple, answer_input_ids: Tensor, labelled: Tensor, index: Tensor
) -> Tensor:
    """Vocabulary logits of the words of all answers that are `labelled` (A, L' - 1)."""
    context = _read_questions(part, *questions).select(index)
    return part.decoder.lm_head(part.decoder.decode(answer_input_ids[:, :-1], context)[labelled])


def _log_probabilities(lm_head: nn.Module, states: Tensor, words: Tensor) -> Tensor:
    """Of words (N,) after states (N, D), some rows of vocabulary logits at a time."""
    chunks = zip(states.split(ROWS_PER_CALL), words.split(ROWS_PER_CALL), strict=True)
    return torch.cat([-F.cross_entropy(lm_head(s).float(), w, reduction="none") for s, w in chunks])


def _check_answers(
    answer_input_ids: Tensor, index: Tensor | None, weights: Tensor | None, questions: int
) -> tuple[Tensor, Tensor]:
    """The question and the weight of each answer (A,)."""
    answers = len(answer_input_ids)
    if index is None and answers != questions:
        raise ValueError(
            f"answer_input_ids has {answers} answers to {questions} questions; tell the question of each "
            "with answer_question_index"
        )
    for name, values in (("answer_question_index", index), ("answer_weights", weights)):
        if values is not None and values.shape != (answers,):
            raise ValueError(f"{name} is {tuple(values.shape)} for {answers} answers; give one value each")
    index = torch.arange(answers, device=answer_input_ids.device) if index is None else index
    weights = torch.ones(answers, device=answer_input_ids.device) if weights is None else weights
    return index, weights


def _images_of_texts(
    model: ALBEFModel, pixel_values: Tensor, input_ids: Tensor, image_index: Tensor | None
) -> VisualConcepts:
    """The image of each text (R,): image r of text r, or that of `image_index` (R,)."""
    images = model.image_concepts(model.vision_model(pixel_values))
    if image_index is not None:
        check_index(image_index, len(pixel_values))
        images = images.select(image_index)
    check_pairs(len(images.embeds), input_ids)
    return images


class ClassificationHead(nn.Module):
    """The two-layer head on the fused [CLS] state: (R, D) -> (R, classes)."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.fc1 = Projection(width, width)
        self.fc2 = Projection(width, classes)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(hidden_states)))


class ALBEFClassifier(ALBEFHead):
    """A head that tells the class of a text with its image or images.

    Each has `classify(part, *inputs)`, the logits (R, classes) by `part`: the model, or its teacher.
    """

    def classify_and_learn(self, labels: Tensor | None, *inputs) -> SequenceClassifierOutput:
        """Logits, and with labels (R,) the loss, to which the teacher gives soft labels."""
        logits = self.classify(self, *inputs)
        if labels is None:
            return SequenceClassifierOutput(logits=logits)
        teacher, teacher_logits = self.lead_teacher(), None
        if teacher is not None and self.distillation_weight:
            with torch.no_grad():
                teacher_logits = self.classify(teacher, *inputs)
        losses = distilled_cross_entropy(logits, labels, teacher_logits, self.distillation_weight)
        return SequenceClassifierOutput(loss=losses.mean(), logits=logits)


class ALBEFForVisualEntailment(ALBEFClassifier):
    """ALBEF that tells whether an image entails a sentence, by the classes of `config.id2label`."""

    auto_class = "AutoModelForVisualEntailment"

    def __init__(self, config: ALBEFConfig):
        super().__init__(config)
        self.model = ALBEFModel(config, add_projections=False)
        self.cls_head = ClassificationHead(config.text_config.hidden_size, config.num_labels)
        self.add_teacher("model", "cls_head")

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        image_index: Tensor | None = None,
        return_dict: bool = True,
    ) -> SequenceClassifierOutput | tuple:
        """Logits (R, classes) of sentences (R, L) with images (B, 3, size, size); with `labels` (R,) a loss.

        Sentence r goes with image r, or with `image_index` (R,) with that image, which is encoded once.

        Raises:
            ValueError: the sentences do not fit the images.
        """
        attention_mask = all_ones(input_ids) if attention_mask is None else attention_mask
        output = self.classify_and_learn(labels, pixel_values, input_ids, attention_mask, image_index)
        return output if return_dict else output.to_tuple()

    def classify(self, part: nn.Module, pixel_values, input_ids, attention_mask, image_index) -> Tensor:
        images = _images_of_texts(part.model, pixel_values, input_ids, image_index)
        text_embeds = part.model.text_model(input_ids, attention_mask)
        fused = part.model.fuse(text_embeds, attention_mask, images.key_values, cls_only=True)
        return part.cls_head(fused[:, 0])


_SECOND_LAYERS = {r"\.second_layer\.": ".layer."}  # one fusion layer becomes two, one for each image


class ALBEFForVisualReasoning(ALBEFClassifier):
    """ALBEF that tells whether a sentence is true of two images (NLVR2). Class 1 is true. ALBEF section 5."""

    auto_class = "AutoModelForVisualReasoning"
    _twins = _SECOND_LAYERS

    def __init__(self, config: ALBEFConfig):
        super().__init__(config)
        self.model = ALBEFModel(config, add_projections=False, num_images=2)
        self.cls_head = ClassificationHead(config.text_config.hidden_size, 2)
        self.add_teacher("model", "cls_head")

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> SequenceClassifierOutput | tuple:
        """Logits (B, 2) of sentences (B, L) with pairs of images (B, 2, 3, size, size); with `labels` (B,)
        the loss.

        Raises:
            ValueError: no pairs of images, or not one for each sentence.
        """
        if pixel_values.ndim != 5 or pixel_values.shape[1] != 2:
            raise ValueError(
                f"pixel_values is {tuple(pixel_values.shape)}; give two images per sentence, "
                "(B, 2, 3, size, size)"
            )
        check_pairs(len(pixel_values), input_ids)
        attention_mask = all_ones(input_ids) if attention_mask is None else attention_mask
        labels = None if labels is None else labels.long()
        output = self.classify_and_learn(labels, pixel_values, input_ids, attention_mask)
        return output if return_dict else output.to_tuple()

    def classify(self, part: nn.Module, pixel_values, input_ids, attention_mask) -> Tensor:
        images = pixel_values.transpose(0, 1).flatten(0, 1)  # all first images, then all second ones
        key_values = part.model.project_image(part.model.vision_model(images))
        first, second = torch.arange(len(images), device=images.device).chunk(2)
        text_embeds = part.model.text_model(input_ids, attention_mask)
        fused = part.model.fuse(
            text_embeds, attention_mask, _pair_key_values(key_values, first, second), cls_only=True
        )
        return part.cls_head(fused[:, 0])


class ALBEFForTextAssignment(ALBEFPreTrainedModel, ImageTextHead):
    """ALBEF that tells which of two images a text belongs to, to get used to pairs before NLVR2.

    Class 0 is the first image, 1 the second, 2 neither. ALBEF section 5.
    """

    auto_class = "AutoModelForTextAssignment"
    _twins = _SECOND_LAYERS

    def __init__(self, config: ALBEFConfig):
        super().__init__(config)
        self.model = ALBEFModel(config, num_images=2)
        self.ta_head = Projection(config.text_config.hidden_size, 3)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        negative_image_index: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> SequenceClassifierOutput | tuple:
        """The loss of images (B, 3, size, size) and their texts (B, L), of which pairs of images are made.

        Each text meets its own image and one like it, in either order, or two others like it, all equally
        often: drawn, unless `labels` (B,) and `negative_image_index` (B, 2) tell.

        Raises:
            ValueError: the texts do not fit the images, or there are fewer than three to draw from.
        """
        check_pairs(len(pixel_values), input_ids)
        attention_mask = all_ones(input_ids) if attention_mask is None else attention_mask
        image = self.model.get_image_features(pixel_values)
        if negative_image_index is None:
            negative_image_index = self._draw_two_negatives(image.pooler_output)
        own = torch.arange(len(input_ids), device=input_ids.device)
        if labels is None:
            labels = torch.randint(3, own.shape, device=own.device)
        other, third = negative_image_index.unbind(dim=1)
        first, second = own.where(labels == 0, other), own.where(labels == 1, other.where(labels == 0, third))

        key_values = _pair_key_values(self.model.project_image(image.last_hidden_state), first, second)
        text_embeds = self.model.text_model(input_ids, attention_mask)
        fused = self.model.fuse(text_embeds, attention_mask, key_values, cls_only=True)
        logits = self.ta_head(fused[:, 0])
        output = SequenceClassifierOutput(loss=F.cross_entropy(logits.float(), labels), logits=logits)
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def _draw_two_negatives(self, image_features: Tensor) -> Tensor:
        """Two different images like each image (B, 2), by the similarity of their features (B, P)."""
        if len(image_features) < 3:
            raise ValueError(
                f"pixel_values has {len(image_features)} images; text assignment needs at least three in a "
                "batch, two of which are wrong"
            )
        logits = image_features @ image_features.T / self.config.initial_temperature
        taken = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        first = draw_by_softmax(logits, taken)
        second = draw_by_softmax(logits, taken.scatter(1, first[:, None], True))
        return torch.stack([first, second], dim=1)


def _pair_key_values(key_values: list[KeyValues], first: Tensor, second: Tensor) -> list[KeyValues]:
    """Of each projection what its two layers see: the images at `first` (R,), then those at `second` (R,)."""
    return [(keys[index], values[index]) for keys, values in key_values for index in (first, second)]
