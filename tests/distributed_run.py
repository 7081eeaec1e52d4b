"""What tests/test_distributed.py runs on two processes: OUTPUT_DIR
gradients|train|teacher|dictionary|captions."""

import json
import sys
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tiny import (
    answer_batch,
    assignment_batch,
    canvas_answer_batch,
    canvas_entailment_batch,
    canvas_grounding_batch,
    canvas_pair_batch,
    canvas_retrieval_batch,
    caption_batch,
    entailment_batch,
    lxmert_pretraining_batch,
    pretraining_batch,
    reasoning_batch,
    region_batch,
    retrieval_batch,
    soft_answer_batch,
    soho_pretraining_batch,
    tiny_albef_config,
    tiny_config,
    tiny_lxmert_config,
    tiny_soho_config,
    visual_entailment_batch,
    visual_grounding_batch,
    visual_pair_batch,
    visual_retrieval_batch,
)
from torch.nn.parallel import DistributedDataParallel
from training_run import arguments, image_rows, mixed_collator, mixed_dataset, region_rows, weights
from transformers import PreTrainedModel, set_seed

from hf_vlp import (
    ALBEFForRetrieval,
    LXMERTForGrounding,
    LXMERTForPreTraining,
    LXMERTForQuestionAnswering,
    LXMERTForRetrieval,
    LXMERTForVisualEntailment,
    LXMERTForVisualReasoning,
    SOHOForGrounding,
    SOHOForPreTraining,
    SOHOForQuestionAnswering,
    SOHOForRetrieval,
    SOHOForVisualEntailment,
    SOHOForVisualReasoning,
    XVLMForCaptioning,
    XVLMForPreTraining,
    XVLMForQuestionAnswering,
    XVLMForRetrieval,
    XVLMForTextAssignment,
    XVLMForVisualEntailment,
    XVLMForVisualReasoning,
)
from hf_vlp.data.mixing import MixedStream
from hf_vlp.models.modeling_soho import VisualDictionary
from hf_vlp.training import VLPTrainer

Batch = dict[str, torch.Tensor]
ITC_ONLY = {"itm_weight": 0.0, "mlm_weight": 0.0, "bbox_weight": 0.0, "giou_weight": 0.0}
MAKE_CONFIG = {"lxmert": tiny_lxmert_config, "soho": tiny_soho_config}  # of others X-VLM's
PARTNERS = torch.tensor([1, 0, 3, 2])  # hard negatives come from the same process


def joint_batches() -> dict[str, tuple[type[PreTrainedModel], Batch, dict]]:
    """Batches of four texts, of which each process gets two: model class, batch, config fields."""
    negatives = {"negative_image_index": PARTNERS, "negative_text_index": PARTNERS}
    images = pretraining_batch(4) | negatives
    regions = region_batch() | negatives | {"is_full_image": torch.tensor([False, True, False, True])}
    retrieval = retrieval_batch() | negatives | {"image_ids": torch.tensor([7, 8, 7, 9])}
    sentences = lxmert_pretraining_batch() | {"answer_labels": torch.arange(4)}
    sentences["visual_attention_mask"] = torch.ones_like(
        sentences["visual_attention_mask"]
    )  # of equal weight
    answers = {name: value[:4] for name, value in answer_batch().items()}
    answers.pop("answer_question_index")  # one to each question
    assignment = assignment_batch() | {"negative_image_index": torch.stack([PARTNERS, PARTNERS], 1)}
    captions = caption_batch()
    captions["labels"][0, -1] = -100  # of equal weight
    return {
        "soho_pretraining": (SOHOForPreTraining, soho_pretraining_batch(), {}),
        "soho_answering": (SOHOForQuestionAnswering, canvas_answer_batch(), {}),
        "soho_reasoning": (SOHOForVisualReasoning, canvas_pair_batch(), {}),
        "soho_entailment": (SOHOForVisualEntailment, canvas_entailment_batch(), {}),
        "soho_retrieval": (SOHOForRetrieval, canvas_retrieval_batch() | negatives, {}),
        "soho_grounding": (SOHOForGrounding, canvas_grounding_batch(), {}),
        "answering": (XVLMForQuestionAnswering, answers, {}),
        "entailment": (XVLMForVisualEntailment, entailment_batch(), {}),
        "reasoning": (XVLMForVisualReasoning, reasoning_batch(), {}),
        "assignment": (XVLMForTextAssignment, assignment, {}),
        "captioning": (XVLMForCaptioning, captions, {}),
        "lxmert_pretraining": (LXMERTForPreTraining, sentences, {}),
        "lxmert_answering": (LXMERTForQuestionAnswering, soft_answer_batch(), {}),
        "lxmert_reasoning": (LXMERTForVisualReasoning, visual_pair_batch(), {}),
        "lxmert_entailment": (LXMERTForVisualEntailment, visual_entailment_batch(), {}),
        "lxmert_retrieval": (LXMERTForRetrieval, visual_retrieval_batch() | negatives, {}),
        "lxmert_grounding": (LXMERTForGrounding, visual_grounding_batch(), {}),
        "images": (XVLMForPreTraining, images, {}),
        "regions": (XVLMForPreTraining, regions, {}),
        "local_regions": (XVLMForPreTraining, regions, {"trunk": "clip"}),
        "regions_with_ids": (XVLMForPreTraining, regions | {"image_ids": torch.tensor([0, 1, 1, 2])}, {}),
        "retrieval": (XVLMForRetrieval, retrieval, {}),
        "itc": (XVLMForPreTraining, images, ITC_ONLY),
        "itc_official": (XVLMForPreTraining, images, ITC_ONLY | {"official_gather_gradient": True}),
    }


def half(batch: Batch, rank: int) -> Batch:
    """Rows of one process, and its image if there are two; indices count within them."""
    mine = {
        name: value[rank * len(value) // 2 : (rank + 1) * len(value) // 2] for name, value in batch.items()
    }
    mine |= {name: value % 2 for name, value in mine.items() if name.startswith("negative_")}
    indices = mine.keys() & {"image_index", "region_image_index"}
    return mine | {name: torch.zeros_like(mine[name]) for name in indices}


def build(name: str) -> tuple[PreTrainedModel, Batch]:
    model_class, batch, fields = joint_batches()[name]
    set_seed(0)
    make_config = MAKE_CONFIG.get(name.split("_")[0], tiny_config)
    return model_class(make_config(**fields)).eval(), batch


def gradients(model: torch.nn.Module) -> Batch:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def write_gradients(output_dir: Path):
    for name in joint_batches():
        model, batch = build(name)
        # LXMERT and SOHO have none, which a second forward would tell
        wrapped = DistributedDataParallel(
            model, find_unused_parameters=not name.startswith(tuple(MAKE_CONFIG))
        )
        wrapped(**half(batch, dist.get_rank())).loss.backward()
        wrapped(**half(batch, dist.get_rank()))
        if dist.get_rank() == 0:
            save_file(gradients(model), output_dir / f"{name}.safetensors")


class RecordingTrainer(VLPTrainer):
    """Keeps what kind each training batch of this process is, and its loss terms."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.records = []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            terms = {key: value.item() for key, value in outputs.items() if key.startswith("loss_")}
            self.records.append({"pixels": inputs["pixel_values"].sum().item(), **terms})
        return (loss, outputs) if return_outputs else loss


def trainer(output_dir: Path, train_dataset, **fields) -> RecordingTrainer:
    set_seed(1)
    return RecordingTrainer(
        XVLMForPreTraining(tiny_config()),
        arguments(output_dir, max_steps=6, **fields),
        train_dataset=train_dataset,
        eval_dataset=[{**row, "kind": "image"} for row in image_rows(14)],
        data_collator=mixed_collator(),
    )


def write_training(output_dir: Path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    first = trainer(output_dir, mixed_dataset(), **saving)
    first.train()
    report = {"log": first.state.log_history, "records": first.records, "evaluation": first.evaluate()}
    save_file(weights(first), output_dir / f"weights{dist.get_rank()}.safetensors")

    streams = (
        datasets.Dataset.from_list(rows).to_iterable_dataset() for rows in (image_rows(30), region_rows(9))
    )
    streaming = trainer(output_dir / "stream", MixedStream(*streams, batch_size=4, run_length=2))
    streaming.train()
    report["stream"] = streaming.records
    (output_dir / f"report{dist.get_rank()}.json").write_text(json.dumps(report))

    resumed = trainer(output_dir, mixed_dataset(), gradient_checkpointing=True, **saving)
    if "--resume" in sys.argv:
        resumed.train(resume_from_checkpoint=str(output_dir / "checkpoint-3"))
        save_file(weights(resumed), output_dir / f"resumed{dist.get_rank()}.safetensors")


def write_teacher(output_dir: Path):
    """Three steps of ALBEF, from seeds that differ between the processes."""
    rank = dist.get_rank()
    set_seed(rank)
    model = ALBEFForRetrieval(tiny_albef_config(queue_size=10, momentum=0.9)).train()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    batch = half(
        retrieval_batch() | {"negative_image_index": PARTNERS, "negative_text_index": PARTNERS}, rank
    )
    for _ in range(3):
        optimizer.zero_grad()
        wrapped(**batch).loss.backward()
        optimizer.step()
    with torch.no_grad():  # what rank 0 alone holds must not reach the other by the next forward
        model.queue.image_features[0] = rank
    wrapped(**batch)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, output_dir / f"teacher{rank}.safetensors"
    )


def write_captions(output_dir: Path):
    """Two steps of self-critical training, each process with samples and rewards of its own."""
    from test_training_captioning import trainer

    records, rank = [], dist.get_rank()

    def reward(captions, references):
        records.append(captions)
        return [float(len(caption)) for caption in captions]

    run = trainer(output_dir, reward, max_steps=2, per_device_train_batch_size=2)
    before = weights(run)
    run.train()
    save_file(before, output_dir / f"before{rank}.safetensors")
    save_file(weights(run), output_dir / f"captions{rank}.safetensors")
    (output_dir / f"captions{rank}.json").write_text(json.dumps(records))


def write_dictionary(output_dir: Path):
    """Three steps of SOHO's dictionary, each process with cells of its own, and of one that revives entries
    by random cells, which differ between the processes."""
    rank = dist.get_rank()
    torch.manual_seed(rank)
    for name, fields in (("dictionary", {}), ("revived", {"vd_revive_below": 2.0, "vd_size": 24})):
        dictionary = VisualDictionary(tiny_soho_config(**fields)).train()
        dictionary.reset()
        for cells in dictionary_cells():
            dictionary(cells[rank : rank + 1], copies=2)
        save_file(dictionary.state_dict(), output_dir / f"{name}{rank}.safetensors")


def dictionary_cells() -> torch.Tensor:
    """Of three steps and two processes: (3, 2, 7, 16)."""
    return torch.randn(3, 2, 7, 16, generator=torch.Generator().manual_seed(0))


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    tasks = {"gradients": write_gradients, "train": write_training, "teacher": write_teacher}
    tasks |= {"dictionary": write_dictionary, "captions": write_captions}
    tasks[sys.argv[2]](Path(sys.argv[1]))
    dist.destroy_process_group()
