"""Beam search by the rule that X-VLM's captions were published with, for transformers' `generate`.

That rule, of transformers 4.12, divides the log-probability of a text, [SEP] included, by its length with the
prompt and without [SEP]; today's divides by the number of new words. The lengths decide which beam wins, and
when a search ends. B: texts, K: beams, L: length, V: vocabulary.
"""

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

_NEVER = -1e9  # log-probability of what must not be chosen


def official_beam_search(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    **model_kwargs,
) -> Tensor:
    """The `custom_generate` of `generate`: the best `num_return_sequences` texts of each prompt, ids (B, L).

    Of the config it reads `num_beams`, `length_penalty` (power of the length), `max_length`, `eos_token_id`
    and `pad_token_id`; `logits_processor` does the rest, such as `min_length`. Each of the prompts
    (B * K, L) comes K times, as `generate` has it.

    Raises:
        ValueError: fewer than two beams, or sampling.
    """
    beams, length_penalty = generation_config.num_beams, generation_config.length_penalty
    if beams < 2 or generation_config.do_sample:
        raise ValueError(
            f"num_beams is {beams} and do_sample {generation_config.do_sample}; the official rule chooses "
            "among beams, so use at least two without sampling"
        )
    eos, pad = generation_config.eos_token_id, generation_config.pad_token_id or 0
    eos = eos[0] if isinstance(eos, list) else eos
    texts, max_length = len(input_ids) // beams, generation_config.max_length
    first_rows = torch.arange(texts, device=input_ids.device)[:, None] * beams  # (B, 1)

    words, sums = input_ids, torch.zeros(texts, beams, device=input_ids.device)  # (B * K, L), (B, K)
    sums[:, 1:] = _NEVER  # copies of the prompt
    finished = words.new_full((texts, beams, max_length), pad)
    scores = torch.full_like(sums, -torch.inf)  # of the finished ones
    done = torch.zeros(texts, dtype=torch.bool, device=input_ids.device)
    while words.shape[1] < max_length:
        output = model(**model.prepare_inputs_for_generation(words, **model_kwargs), return_dict=True)
        model_kwargs["past_key_values"] = output.past_key_values
        log_probabilities = logits_processor(words, output.logits[:, -1].float().log_softmax(dim=-1))
        vocabulary = log_probabilities.shape[-1]
        totals = (log_probabilities.view(texts, beams, vocabulary) + sums[:, :, None]).flatten(1)
        totals, best = totals.topk(2 * beams)  # enough to go on with if all beams end
        rows, next_words = first_rows + best // vocabulary, best % vocabulary  # (B, 2K)

        length = words.shape[1] ** length_penalty
        ends = next_words == eos
        may_end = ends & ~done[:, None]
        may_end[:, beams:] = False
        found = (totals / length).masked_fill(~may_end, -torch.inf)
        finished, scores = _keep_best(finished, scores, _end(words[rows], eos, max_length, pad), found)
        done = done | (scores.amin(dim=1) >= totals[:, 0] / length)

        going_on = ends.long().argsort(dim=1, stable=True)[:, :beams]  # the best that do not end
        sums, rows = totals.gather(1, going_on), rows.gather(1, going_on)
        next_words = next_words.gather(1, going_on)
        words = torch.cat([words[rows.flatten()], next_words.view(-1, 1)], dim=1)
        model_kwargs["past_key_values"].reorder_cache(rows.flatten())
        if done.all():
            break
    left = (sums / words.shape[1] ** length_penalty).masked_fill(done[:, None], -torch.inf)
    finished, scores = _keep_best(
        finished, scores, _end(words.view(texts, beams, -1), eos, max_length, pad), left
    )
    chosen = finished[:, : generation_config.num_return_sequences].flatten(0, 1)
    return chosen[:, : int((chosen != pad).any(dim=0).nonzero().max()) + 1]


def _keep_best(texts: Tensor, scores: Tensor, more: Tensor, more_scores: Tensor) -> tuple[Tensor, Tensor]:
    """The K best of texts (B, K, L) and more texts (B, N, L) with their scores, best first."""
    scores, best = torch.cat([scores, more_scores], dim=1).topk(scores.shape[1])
    texts = torch.cat([texts, more], dim=1)
    return texts.gather(1, best[:, :, None].expand(-1, -1, texts.shape[-1])), scores


def _end(texts: Tensor, eos: int, max_length: int, pad: int) -> Tensor:
    """Texts (B, N, L) as they are stored (B, N, max_length): with [SEP] where there is room for it."""
    stored = texts.new_full((*texts.shape[:2], max_length), pad)
    stored[..., : texts.shape[-1]] = texts
    if texts.shape[-1] < max_length:
        stored[..., texts.shape[-1]] = eos
    return stored
