"""Answering questions with a decoder that attends to the question fused with the image (ALBEF section 5,
X-VLM section 4): writing answers, or ranking a list of them.

R: questions, L: text length, D: text width, A: answers, V: vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from .image_text import LabelledHead, all_ones, images_of_texts
from .layers_bert import Context, Packing
from .outputs import RankedAnswers, VLPForQuestionAnsweringOutput

ROWS_PER_CALL = 2048  # words whose vocabulary logits are held at a time


class AnsweringHead(LabelledHead):
    """A model (`model`) that reads questions about images, and a decoder (`decoder`) of answers."""

    auto_class = "AutoModelForVisualQuestionAnswering"
    _twins = {  # the decoder starts as the fusion layers, without the image
        r"^(|teacher\.)decoder\.embeddings\.": r"\1model.text_model.embeddings.",
        r"^(|teacher\.)decoder\.layer\.": r"\1model.fusion_model.layer.",
        r"^(|teacher\.)decoder\.key_values\.": r"\1model.fusion_model.image_key_values.",
    }

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
        _, of_words = self.learn(
            lambda part: _answer_logits(part, questions, answer_input_ids, labelled, index), labels[labelled]
        )
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
        context = read_questions(self, pixel_values, input_ids, attention_mask, image_index)
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
            context = read_questions(self, pixel_values, input_ids, attention_mask, image_index)
        settings = {"max_new_tokens": 10, **generation_kwargs}
        return self.decoder.generate(starts, context=context, past_key_values=DynamicCache(), **settings)


def read_questions(
    part: nn.Module,
    pixel_values: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    image_index: Tensor | None,
) -> Context:
    """What the decoder of `part`, the model or its teacher, attends to: the fused questions (R, L, D)."""
    attention_mask = all_ones(input_ids) if attention_mask is None else attention_mask
    images = images_of_texts(part.model, pixel_values, input_ids, image_index)
    fused = part.model.fuse(
        part.model.text_model(input_ids, attention_mask), attention_mask, images.key_values
    )
    return part.decoder.read_context(fused, attention_mask)


def _answer_logits(
    part: nn.Module, questions: tuple, answer_input_ids: Tensor, labelled: Tensor, index: Tensor
) -> Tensor:
    """Vocabulary logits of the words of all answers that are `labelled` (A, L' - 1)."""
    context = read_questions(part, *questions).select(index)
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
