"""From photographs to answers with LXMERT: find regions, fine-tune question answering on them, ask about a
photograph.

    python examples/finetune_lxmert.py
    python examples/finetune_lxmert.py --model runs/pretrain_lxmert
    hf-vlp extract train2014 val2014 --extractor butd --out coco_regions
    python examples/finetune_lxmert.py --model lxmert-base --features coco_regions --extractor butd \\
        --train train.json nominival.json --test minival.json --answers trainval_label2ans.json \\
        --photo kitchen.jpg --ask "what is on the table?"

The first line draws scenes into a folder, finds their regions, and trains a tiny new model on them, in some
two minutes; the second starts from what `pretrain_lxmert.py` saved, and learns more. The third finds the
regions of photographs, once, and the last trains on them and on the official lists of VQA v2, with the
paper's schedule. The model chooses among --answers; what it knows of them from pre-training is kept.
--extractor is what the saved model finds regions with. Every option not listed here goes to
`VLPTrainingArguments`.
"""

import argparse
from pathlib import Path

from datasets import Dataset, concatenate_datasets
from small_lxmert import DrawnObjects, tiny_lxmert
from transformers import HfArgumentParser, set_seed

import hf_vlp
from hf_vlp import LXMERTForQuestionAnswering, LXMERTProcessor
from hf_vlp.data.features import RegionStore, RegionWriter, with_regions
from hf_vlp.data.lxmert_collators import LXMERTQuestionCollator
from hf_vlp.data.lxmert_readers import read_answer_table, read_lxmert_vqa
from hf_vlp.data.shapes import shapes_dataset
from hf_vlp.evaluation import evaluate_question_answering, majority_answer_accuracy
from hf_vlp.training import RECIPES, VLPTrainer, VLPTrainingArguments

TEST_SCENES = 256
SCHEDULE_ON_SHAPES = {
    "max_steps": 800,
    "per_device_train_batch_size": 64,
    "learning_rate": 5e-4,
    "warmup_steps": 50,
    "lr_scheduler_type": "cosine",
    "logging_steps": 50,
    "save_strategy": "no",
}


def draw_questions(folder: Path, scenes: int, seed: int) -> list[Dataset]:
    """Questions to train and to test on, without images: these and a store of their regions go to
    `folder`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    splits, extractor = [], DrawnObjects()
    with RegionWriter(folder / "regions") as writer:
        for split, count in (("train", scenes), ("test", TEST_SCENES)):
            rows = shapes_dataset("questions", split, count, seed=seed)
            ids = [str(number) for number in rows["question_id"]]
            for name, image in zip(ids, rows["image"], strict=True):
                image.save(folder / "images" / f"{name}.png")
                if name not in writer:
                    writer.write(name, extractor.extract([image]).row(0))
            splits.append(rows.remove_columns("image").add_column("image_id", ids))
    return splits


# 1. What to do
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
)
parser.add_argument("--model", help="folder or Hub name to start from; without it a tiny new model")
parser.add_argument("--train", nargs="+", help="official JSON lists of questions")
parser.add_argument("--test", nargs="+", help="lists to score on, likewise")
parser.add_argument("--answers", help="the answers to choose among; without it those of the model")
parser.add_argument("--features", help="store of the regions of the images that the lists name")
parser.add_argument("--extractor", help="what found these regions: a folder, a name, grid:NAME, ...")
parser.add_argument("--scenes", type=int, default=10_000, help="drawn scenes to train on")
parser.add_argument("--photo", help="photograph to ask about in the end")
parser.add_argument("--ask", default="is there a red circle", help="what to ask")
parser.add_argument("--push-to-hub", metavar="ORG/NAME", help="repository on the Hub to push the result to")
options, rest = parser.parse_known_args()
has_own_rows = bool(options.train)
if has_own_rows and not options.model:
    parser.error("your own rows need --model: the tiny new model knows the words of the drawn scenes only")
if has_own_rows and not options.features:
    parser.error("your own rows need --features: hf-vlp extract writes them")

training_parser = HfArgumentParser(VLPTrainingArguments)
training_parser.set_defaults(output_dir="runs/lxmert_answers")
training_parser.set_defaults(**(RECIPES["lxmert_vqa"] if has_own_rows else SCHEDULE_ON_SHAPES))
(training,) = training_parser.parse_args_into_dataclasses(rest)
set_seed(training.seed)
output_dir = Path(training.output_dir)

# 2. The questions, and the regions of their images; of drawn scenes both are made here
if has_own_rows:
    train = concatenate_datasets([read_lxmert_vqa([file]) for file in options.train])
    test = options.test and concatenate_datasets([read_lxmert_vqa([file]) for file in options.test])
else:
    train, test = draw_questions(output_dir, options.scenes, training.seed)
    options.features = output_dir / "regions"
    options.photo = options.photo or output_dir / "images" / f"{test[0]['image_id']}.png"
store = RegionStore(options.features)
train, test = (rows and with_regions(rows, store) for rows in (train, test))

# 3. The model, which keeps what it knows of the answers, and its processor, which keeps the extractor
if options.model:
    extractor = options.extractor or (None if has_own_rows else DrawnObjects())
    processor = LXMERTProcessor.from_pretrained(options.model, extractor=extractor)
    model = LXMERTForQuestionAnswering.from_pretrained(options.model)
else:
    model, processor = tiny_lxmert(LXMERTForQuestionAnswering)
if options.answers:
    print(f"known from pre-training: {model.load_answers(read_answer_table(options.answers))}")

# 4. Training
trainer = VLPTrainer(
    model,
    training,
    train_dataset=train,
    data_collator=LXMERTQuestionCollator(processor=processor, answers=model.config.answers),
    processing_class=processor,
)
trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
if not trainer.is_world_process_zero():
    raise SystemExit

# 5. Saving and sharing: model, processor, and the code that reads them
model.save_pretrained(output_dir)
processor.save_pretrained(output_dir)
print(f"saved to {output_dir}")
if options.push_to_hub:
    model.push_to_hub(options.push_to_hub)
    processor.push_to_hub(options.push_to_hub)

# 6. The score, beside that of who answers without looking
if test:
    result = evaluate_question_answering(model, processor, test)
    texts = (rows.remove_columns("regions") for rows in (train, test))
    print(f"accuracy:                              {result.accuracy:.3f} of {len(test)} questions")
    print(f"most frequent answer of the same type: {majority_answer_accuracy(*texts):.3f}")

# 7. A photograph, a question, and the best answers
if options.photo:
    (prediction,) = hf_vlp.predict("vqa", model, processor, [str(options.photo)], [options.ask], top_k=3)
    print(f"{options.photo}: {options.ask}?")
    for one in prediction["answers"]:
        print(f"  {one['probability']:.2f} {one['answer']}")
