"""Self-critical training of captions (SCST, arXiv 1612.00563), as X-VLM fine-tunes them: captions that the
model draws are learnt by how much better they are than the one it would write.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from .arguments import VLPTrainingArguments
from .trainer import VLPTrainer

Reward = Callable[[Sequence[str], Sequence[Sequence[str]]], Sequence[float]]


class SelfCriticalTrainer(VLPTrainer):
    """`VLPTrainer` whose loss is that of self-critical training.

    Of each image, `num_samples` captions are drawn with dropout, and the greedy one is written without; a
    sample's advantage is how much its reward exceeds that of the greedy caption. The loss is the mean of
    advantage x mean negative log-probability of the sample's words. Samples are drawn without gradient; their
    log-probabilities come from one more pass of the model on them, wrapped as it is, so that gradients of
    processes are averaged.

    Logs `reward_sample` and `reward_greedy`; in evaluation the loss is minus the greedy reward.

    Args:
        reward: of N captions and, for each, a list of references: N numbers, such as
            `hf_vlp.evaluation.cider_d_reward(references of the training set)`.
        num_samples: captions drawn of each image.
        max_length: tokens of a caption, [CLS] and prompt included.

    The model has `generate(pixel_values, input_ids, ...)`, and a forward pass that gives `caption_losses`;
    `processing_class` has `decode_captions` and a tokenizer; batches are those of `SelfCriticalCollator`.
    Writing calls the model itself, so that its parameters must not be sharded (FSDP, ZeRO-3).

    Raises:
        ValueError: `num_samples` below 1, or no `processing_class` that decodes captions.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: VLPTrainingArguments | None = None,
        *,
        reward: Reward,
        num_samples: int = 5,
        max_length: int = 20,
        **kwargs,
    ):
        super().__init__(model, args, **kwargs)
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}; use a number of captions of at least 1")
        if not hasattr(self.processing_class, "decode_captions"):
            raise ValueError(
                f"processing_class is {type(self.processing_class).__name__}; give the processor of a model "
                "that writes captions"
            )
        self.reward, self.num_samples, self.max_length = reward, num_samples, max_length
        self.label_names = ["references"]  # what tells evaluation that there is a loss

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        images, prompts, references = (inputs[name] for name in ("pixel_values", "input_ids", "references"))
        greedy = self._rewards(self._write_greedily(model, images, prompts), references)
        if not model.training:
            outputs = {"loss": -greedy.mean(), "reward_greedy": greedy.mean()}
            self.evaluation_terms.add(outputs, len(images))
            return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

        with self._own_randomness(images.device):
            samples = self._write(
                model, images, prompts, do_sample=True, top_k=0, num_return_sequences=self.num_samples
            )
        repeated = [texts for texts in references for _ in range(self.num_samples)]
        rewards = self._rewards(samples, repeated)
        advantages = rewards - greedy.repeat_interleave(self.num_samples)
        labels = self._labels(samples, prompts.shape[1])
        losses = model(pixel_values=images, input_ids=samples, labels=labels).caption_losses
        outputs = {
            "loss": (advantages * losses).mean(),
            "reward_sample": rewards.mean(),
            "reward_greedy": greedy.mean(),
        }
        self.training_terms.add(outputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    @contextlib.contextmanager
    def _own_randomness(self, device: torch.device) -> Iterator[None]:
        """Random numbers that differ between processes, whose generators are alike."""
        seed = int(torch.randint(2**62, ())) + self.args.process_index
        devices = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            yield

    def _write_greedily(self, model: nn.Module, images: Tensor, prompts: Tensor) -> Tensor:
        was_training = model.training
        model.eval()
        try:
            return self._write(model, images, prompts)
        finally:
            model.train(was_training)

    def _write(self, model: nn.Module, images: Tensor, prompts: Tensor, **settings) -> Tensor:
        """Captions (R, L), those of an image next to one another."""
        writer = self.accelerator.unwrap_model(model)
        with torch.no_grad(), self.accelerator.autocast():
            return writer.generate(images, prompts, max_length=self.max_length, **settings)

    def _rewards(self, captions: Tensor, references: Sequence[Sequence[str]]) -> Tensor:
        texts = self.processing_class.decode_captions(captions)
        return torch.tensor(self.reward(texts, references), dtype=torch.float, device=captions.device)

    def _labels(self, captions: Tensor, prompt_length: int) -> Tensor:
        """The words of captions (R, L) that were drawn, up to the first [SEP], and -100 elsewhere."""
        is_end = captions == self.processing_class.tokenizer.sep_token_id
        is_end[:, :prompt_length] = False
        over = is_end.cumsum(dim=1) - is_end.long() > 0
        over[:, :prompt_length] = True
        return captions.masked_fill(over, -100)
