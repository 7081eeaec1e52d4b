"""Speed of answer ranking: keys and values once per question, answers unpadded, against the official way.

The base model at 384 pixels ranks 3,128 random answers to random questions, random weights and all. Prints
the tables of docs/benchmarks.md:

    python benchmarks/answer_ranking.py
    python benchmarks/answer_ranking.py --paper xvlm

B: questions, each about an image of its own, L: question length, N: answers in the list, A: answer length
with [CLS] and [SEP], k: answers that are scored whole, D: text width, V: vocabulary.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from measuring import Texts, build_parser, in_turn, machine, median, random_texts, ratio
from torch import Tensor

from hf_vlp import ALBEFConfig, ALBEFForQuestionAnswering, XVLMConfig, XVLMForQuestionAnswering
from hf_vlp.models.image_text_answering import AnsweringHead
from hf_vlp.models.outputs import RankedAnswers

TOP_K = 128
# answers by word pieces, as in a list of the 3,128 most frequent ones of VQA v2
ANSWERS = {1: 2000, 2: 700, 3: 300, 4: 95, 5: 22, 6: 7, 7: 3, 8: 1}
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.1}  # of log-probabilities
OURS = "this package"
# a model, and how it ranks answers for question states (B, L, D) with their mask (B, L)
Way = tuple[AnsweringHead, Callable[..., RankedAnswers]]


def build_model(paper: str, device: str, dtype: torch.dtype) -> AnsweringHead:
    """The base model for images of 384 pixels."""
    if paper == "albef":
        vit = ALBEFConfig().vision_config.to_dict() | {"image_size": 384}
        model = ALBEFForQuestionAnswering(ALBEFConfig(vision_config=vit, momentum_teacher=False))
    else:
        swin = XVLMConfig().vision_config.to_dict() | {"image_size": 384, "window_size": 12}
        model = XVLMForQuestionAnswering(XVLMConfig(vision_config=swin))
    return model.eval().to(device, dtype)


def random_answers(device: str) -> Texts:
    """The list in any order: ids and mask (N, A), `[CLS] words [SEP]`."""
    pieces = torch.tensor([length for length, count in ANSWERS.items() for _ in range(count)])
    ids, mask = random_texts(pieces[torch.randperm(len(pieces))] + 2)
    ids[torch.arange(len(ids)), mask.sum(dim=1) - 1] = 102  # [SEP]
    return Texts(ids.to(device), mask.to(device))


def random_questions(count: int, model: AnsweringHead) -> tuple[Tensor, Texts]:
    """Images (B, 3, size, size) and questions of 8 to 12 word pieces."""
    size = model.config.vision_config.image_size
    pixels = torch.randn(count, 3, size, size).to(model.device, model.dtype)
    questions = random_texts(torch.randint(8, 13, (count,)))
    return pixels, Texts(*(each.to(model.device) for each in questions))


def read_questions(model: AnsweringHead, pixels: Tensor, questions: Texts) -> Tensor:
    """Question states (B, L, D)."""
    base = model.model
    key_values = base.project_image(base.vision_model(pixels))
    return base.fuse(base.text_model(*questions), questions.attention_mask, key_values)


def official_ranking(
    model: AnsweringHead, answers: Texts, states: Tensor, mask: Tensor, shorten: bool = False
) -> RankedAnswers:
    """Rank the official way: a copy of the question states for each answer, projected in every layer.

    [CLS] is read alone to choose the candidates, then again with each of them; vocabulary logits are computed
    in all slots. Answers are padded to the longest of the list, with `shorten` to the longest candidate.
    """
    ids, answer_mask = answers
    first = decode_officially(model, ids[:1, :1].repeat(len(states), 1), states, mask)[:, 0]
    probabilities, candidates = first.softmax(dim=1)[:, ids[:, 1]].topk(TOP_K, dim=1)  # (B, k)
    words = ids[candidates.flatten()]  # (B * k, A)
    if shorten:
        words = words[:, : int(answer_mask[candidates.flatten()].sum(dim=1).max())]
    copies, copied_mask = states.repeat_interleave(TOP_K, dim=0), mask.repeat_interleave(TOP_K, dim=0)
    logits = decode_officially(model, words, copies, copied_mask)[:, :-1]
    labels = words.masked_fill(words == 0, -100)[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    scores = probabilities.log() - losses.sum(dim=1).view_as(probabilities)  # the first word counts twice
    probabilities, order = scores.softmax(dim=1).topk(TOP_K, dim=1)
    return RankedAnswers(indices=candidates.gather(1, order), probabilities=probabilities)


def decode_officially(model: AnsweringHead, words: Tensor, states: Tensor, mask: Tensor) -> Tensor:
    """Logits after every slot, each row with question states of its own: (M, A) -> (M, A, V)."""
    decoder = model.decoder
    return decoder.lm_head(decoder.decode(words, decoder.read_context(states, mask))).float()


def our_ranking(model: AnsweringHead, answers: Texts, states: Tensor, mask: Tensor) -> RankedAnswers:
    """`rank_answers` from the question states on."""
    return model.rank_in_context(model.decoder.read_context(states, mask), *answers, top_k=TOP_K)


def read_and_rank(
    model: AnsweringHead,
    rank: Callable[..., RankedAnswers],
    answers: Texts,
    pixels: Tensor,
    questions: Texts,
) -> RankedAnswers:
    """Read image and question, then rank."""
    return rank(model, answers, read_questions(model, pixels, questions), questions.attention_mask)


def check_answers(name: str, expected: RankedAnswers, found: RankedAnswers, dtype: str):
    """Assert that a way chooses the same answers and scores them alike, and say how much scores vary.

    In half precision a few candidates whose first words are as good as equal may differ.
    """
    same = expected.indices[:, :, None] == found.indices[:, None]  # (B, k, k)
    where, row, column = same.nonzero().unbind(dim=1)
    logs = [each.probabilities.float().clamp(min=1e-37).log() for each in (expected, found)]
    difference = float((logs[0][where, row] - logs[1][where, column]).abs().max())
    chosen, spread = len(where) / expected.indices.numel(), float(logs[0].std(dim=1).mean())
    print(f"{name}: {chosen:.0%} the same answers; log-probabilities differ by {difference:.0e}", end=", ")
    print(f"between answers by {spread:.0f}.")
    assert chosen >= (1.0 if dtype == "float32" else 0.8), f"only {chosen:.1%} of the answers are the same"
    assert difference < TOLERANCE[dtype], f"the two ways differ by {difference}"


def print_speeds(ways: dict[str, Way], answers: Texts, count: int, rounds: int):
    """Seconds per question with so many in a call: the ranking alone, and image and question read before."""
    model, _ = ways[OURS]
    pixels, questions = random_questions(count, model)
    states, mask = read_questions(model, pixels, questions), questions.attention_mask
    rankings = {name: partial(rank, m, answers, states, mask) for name, (m, rank) in ways.items()}
    whole = {name: partial(read_and_rank, *way, answers, pixels, questions) for name, way in ways.items()}
    whole[OURS] = partial(model.rank_answers, pixels, *questions, *answers, top_k=TOP_K)
    alone, together = in_turn(rankings, rounds), in_turn(whole, rounds)
    official = next(iter(ways))
    for name in ways:
        figures = " | ".join(
            f"{median(times, name) / count:.3g} s | {ratio(times, official, name):.1f}"
            for times in (alone, together)
        )
        print(f"| {count} | {name} | {figures} |")


@torch.inference_mode()
def main():
    parser = build_parser(__doc__)
    parser.add_argument("--paper", choices=["albef", "xvlm"], default="albef")
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float32")
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 4], help="questions per call")
    options = parser.parse_args()
    torch.manual_seed(0)

    # 1. The model, once more with attention as the official code has it, and the list of answers.
    model = build_model(options.paper, options.device, getattr(torch, options.dtype))
    written_out = copy.deepcopy(model)
    written_out.set_attn_implementation("eager")  # products and softmax one by one
    answers = random_answers(options.device)
    ways = {
        "official: padded to the longest of the list": (written_out, official_ranking),
        "the same with fused attention": (model, official_ranking),
        "and padded to the longest candidate": (model, partial(official_ranking, shorten=True)),
        OURS: (model, our_ranking),
    }
    pieces = answers.attention_mask.sum(dim=1).float() - 2
    lengths = f"{len(pieces)} answers of {pieces.mean():.1f} pieces, {pieces.max():.0f} at most"
    print(f"{machine(options.device, options.dtype)}; {lengths}; in {options.rounds} rounds.")

    # 2. All ways give the same answers.
    pixels, questions = random_questions(2, model)
    found = model.rank_answers(pixels, *questions, *answers, top_k=TOP_K)
    for name, way in ways.items():
        check_answers(name, read_and_rank(*way, answers, pixels, questions), found, options.dtype)

    # 3. Seconds per question.
    print("\n| questions per call | way | ranking alone | times faster | whole question | times faster |")
    print("|---|---|---|---|---|---|")
    for count in options.questions:
        print_speeds(ways, answers, count, options.rounds)


if __name__ == "__main__":
    main()
