"""Short runs of pretraining that tests start, kill and resume: X-VLM's on a mixture, ALBEF's on captions,
LXMERT's on sentences and regions, SOHO's on captions.

As a script: OUTPUT_DIR kill|kill-saving xvlm|albef|lxmert|soho.
"""

import os
import signal
import sys

import datasets
import torch
from data_fixtures import picture
from tiny import (
    WORDS,
    tiny_albef_config,
    tiny_albef_processor,
    tiny_config,
    tiny_lxmert_config,
    tiny_lxmert_processor,
    tiny_processor,
    tiny_soho_config,
    tiny_soho_processor,
)
from tiny import region_rows as detected_regions
from transformers import TrainerCallback, set_seed

from hf_vlp import ALBEFForPreTraining, LXMERTForPreTraining, SOHOForPreTraining, XVLMForPreTraining
from hf_vlp.data.collators import ImageTextCollator, RegionCollator
from hf_vlp.data.lxmert_collators import LXMERTPretrainingCollator
from hf_vlp.data.masking import TokenMasking
from hf_vlp.data.mixing import MixedCollator, MixedDataset
from hf_vlp.data.soho_collators import SOHOPretrainingCollator
from hf_vlp.training import VLPTrainer, VLPTrainingArguments

STEPS, SAVE_STEPS, KILLED_AT = 14, 4, 10


def image_rows(count: int) -> list[dict]:
    return [
        {
            "image": picture(i),
            "caption": [f"a {WORDS[3 + i % 4]} circle", f"{WORDS[i % len(WORDS)]} and the square"],
        }
        for i in range(count)
    ]


def region_rows(count: int) -> list[dict]:
    boxes = [[4, 6, 30, 20], [30, 10, 40, 40]]
    return [
        {"image": picture(i), "boxes": boxes, "phrases": [f"{WORDS[3 + i % 4]} cross", "the triangle"]}
        for i in range(count)
    ]


def mixed_collator() -> MixedCollator:
    processor = tiny_processor()
    return MixedCollator(
        image=ImageTextCollator(processor=processor), region=RegionCollator(processor=processor)
    )


def mixed_dataset() -> MixedDataset:
    return MixedDataset(
        datasets.Dataset.from_list(image_rows(26)), datasets.Dataset.from_list(region_rows(10))
    )


def arguments(output_dir, **fields) -> VLPTrainingArguments:
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return VLPTrainingArguments(output_dir=str(output_dir), **(defaults | fields))


def pretrainer(output_dir, train_dataset=None, callbacks=None, **fields) -> VLPTrainer:
    set_seed(1)
    return VLPTrainer(
        XVLMForPreTraining(tiny_config()),
        arguments(output_dir, **fields),
        train_dataset=mixed_dataset() if train_dataset is None else train_dataset,
        data_collator=mixed_collator(),
        callbacks=callbacks,
    )


def saving_pretrainer(output_dir, **fields) -> VLPTrainer:
    return pretrainer(output_dir, save_strategy="steps", save_steps=SAVE_STEPS, official_adamw=True, **fields)


def saving_albef_pretrainer(output_dir, callbacks=None, **fields) -> VLPTrainer:
    """Batches of 4 do not divide the queue of 6, and the teacher's weight rises all the way."""
    set_seed(1)
    processor = tiny_albef_processor()
    return VLPTrainer(
        ALBEFForPreTraining(tiny_albef_config(momentum=0.9)),
        arguments(output_dir, save_strategy="steps", save_steps=SAVE_STEPS, alpha_ramp_epochs=2.0, **fields),
        train_dataset=datasets.Dataset.from_list(image_rows(26)),
        data_collator=ImageTextCollator(
            processor=processor, masking=TokenMasking(processor.tokenizer, mask_probability=0.4)
        ),
        callbacks=callbacks,
    )


def saving_lxmert_pretrainer(output_dir, callbacks=None, **fields) -> VLPTrainer:
    """Words, regions, texts and answers are drawn anew each time; answers count from the second epoch on."""
    set_seed(1)
    captions = [row["caption"][0] for row in image_rows(26)]
    rows = [
        {"regions": regions, "caption": caption, "image_id": i, "answers": ["red"], "answer_scores": [1.0]}
        for i, (caption, regions) in enumerate(zip(captions, detected_regions(26), strict=True))
    ]
    return VLPTrainer(
        LXMERTForPreTraining(tiny_lxmert_config()),
        arguments(
            output_dir,
            save_strategy="steps",
            save_steps=SAVE_STEPS,
            bert_adam=True,
            answer_loss_weights=[0.0, 2.0],
            **fields,
        ),
        train_dataset=rows,
        data_collator=LXMERTPretrainingCollator(processor=tiny_lxmert_processor(), answers=["red", "blue"]),
        callbacks=callbacks,
    )


def saving_soho_pretrainer(output_dir, callbacks=None, **fields) -> VLPTrainer:
    """The dictionary revives entries, and the trunk stays as it is in the first of two epochs."""
    set_seed(1)
    rows = [{**row, "image_id": i} for i, row in enumerate(image_rows(26))]
    return VLPTrainer(
        SOHOForPreTraining(tiny_soho_config(vd_revive_below=0.5, mvm_prob=0.5, mvm_pick="entry")),
        arguments(
            output_dir,
            save_strategy="steps",
            save_steps=SAVE_STEPS,
            sgd_adamw=True,
            freeze_trunk_epochs=1,
            **fields,
        ),
        train_dataset=rows,
        data_collator=SOHOPretrainingCollator(processor=tiny_soho_processor(), captions_per_image=2),
        callbacks=callbacks,
    )


SAVING_PRETRAINERS = {
    "xvlm": saving_pretrainer,
    "albef": saving_albef_pretrainer,
    "lxmert": saving_lxmert_pretrainer,
    "soho": saving_soho_pretrainer,
}


def weights(trainer: VLPTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


class KillAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_while_saving():
    """The second checkpoint's optimizer state is cut short."""
    save = torch.save

    def half(value, file, *args, **kwargs):
        save(value, file, *args, **kwargs)
        if str(file).endswith(f"checkpoint-{2 * SAVE_STEPS}/optimizer.pt"):
            os.truncate(file, os.path.getsize(file) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half


if __name__ == "__main__":
    torch.set_num_threads(1)
    output_dir, how, paper = sys.argv[1:]
    if how == "kill-saving":
        kill_while_saving()
    SAVING_PRETRAINERS[paper](output_dir, callbacks=[KillAt()]).train()
