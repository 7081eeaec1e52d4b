"""Fine-tune ALBEF or X-VLM for question answering: an image and a question go in, the best of a list of
answers comes out.

    python examples/finetune_question_answering.py
    python examples/finetune_question_answering.py --model albef-base --image-size 384 \\
        --train vqa_train.json vqa_val.json vg_qa.json --test vqa_test.json --answers answer_list.json \\
        --image-root coco --vg-root visual_genome
    python examples/finetune_question_answering.py --model albef-base --image-size 384 \\
        --train my_rows --test test_rows

It adds one idea to `finetune_grounding.py`: ALBEF's momentum teacher, a slow copy of the model whose answers
are soft targets beside those of the annotators; X-VLM has none. The first line trains a tiny new ALBEF on
drawn scenes for a minute or two, which shows every step; with --model runs/pretrain_albef it starts from what
`pretrain_albef.py` saved, and learns the task, as X-VLM does with --model runs/pretrain after
`pretrain.py --max_steps 1600`. The others train on your data with the schedule of the model's paper; rows
have the columns image, question, answers (one per annotator) and, if the answers go to the server of VQA,
question_id. Answers are chosen from --answers, a JSON list; without it from the 3,128 most frequent answers
of the training rows. Every option not listed here goes to `VLPTrainingArguments`.
"""

import argparse
import json
from collections import Counter
from functools import partial
from pathlib import Path

from small_albef import TRAINING_SCENES, load_start, read_rows, schedule_for
from transformers import HfArgumentParser, set_seed

from hf_vlp import ALBEFForQuestionAnswering
from hf_vlp.data.shapes import shapes_dataset
from hf_vlp.data.task_collators import QuestionAnsweringCollator
from hf_vlp.data.task_readers import read_answer_list, read_vqa
from hf_vlp.evaluation import evaluate_question_answering, majority_answer_accuracy, write_evalai
from hf_vlp.training import VLPTrainer, VLPTrainingArguments

LISTED_ANSWERS = 3_128  # as many as the official list has

# 1. What to do
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
)
parser.add_argument("--model", help="folder or Hub name to start from; without it a tiny new model")
parser.add_argument("--image-size", type=int, help="pixels a side, if others than the model's")
parser.add_argument("--train", nargs="+", help="ALBEF's JSON lists, saved Datasets, or parquet files")
parser.add_argument("--test", nargs="+", help="rows to score on, likewise")
parser.add_argument("--answers", help="JSON list of the answers to choose from")
parser.add_argument("--image-root", default=".", help="folder of the images that the JSON lists name")
parser.add_argument("--vg-root", help="folder of those that they name as Visual Genome's")
parser.add_argument("--push-to-hub", metavar="ORG/NAME", help="repository on the Hub to push the result to")
options, rest = parser.parse_known_args()
has_own_rows = bool(options.train)
if has_own_rows and not options.model:
    parser.error("your own rows need --model: the tiny new model knows the words of the drawn scenes only")

training_parser = HfArgumentParser(VLPTrainingArguments)
training_parser.set_defaults(output_dir="runs/question_answering")
schedule = schedule_for(options.model, has_own_rows, albef="albef_vqa", xvlm="xvlm_vqa")
training_parser.set_defaults(**schedule)
(training,) = training_parser.parse_args_into_dataclasses(rest)
set_seed(training.seed)

# 2. The rows to train on and those to score on, and the answers to choose from
if has_own_rows:
    read_lists = partial(read_vqa, vqa_root=options.image_root, vg_root=options.vg_root)
    train = read_rows(options.train, read_lists)
    test = options.test and read_rows(options.test, read_lists)
else:
    train = shapes_dataset("questions", "train", TRAINING_SCENES, seed=training.seed)
    test = shapes_dataset("questions", "test", 256, seed=training.seed)
if options.answers:
    answer_list = read_answer_list(options.answers)
else:
    frequency = Counter(answer for answers in train["answers"] for answer in answers)
    answer_list = [answer for answer, _ in frequency.most_common(LISTED_ANSWERS)]

# 3. The model, ALBEF with its teacher, and its processor
model, processor = load_start("vqa", ALBEFForQuestionAnswering, options.model, options.image_size)

# 4. Training; photos are cropped and mirrored
trainer = VLPTrainer(
    model,
    training,
    train_dataset=train,
    data_collator=QuestionAnsweringCollator(processor=processor, augment=has_own_rows),
    processing_class=processor,
)
trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
if not trainer.is_world_process_zero():
    raise SystemExit

# 5. Saving and sharing: model without a teacher, processor, the code that reads them, and the answers
model.save_pretrained(training.output_dir)
processor.save_pretrained(training.output_dir)
Path(training.output_dir, "answer_list.json").write_text(json.dumps(answer_list), encoding="utf-8")
print(f"saved to {training.output_dir}")
if options.push_to_hub:
    model.push_to_hub(options.push_to_hub)
    processor.push_to_hub(options.push_to_hub)

# 6. The score, beside that of who answers without looking; or a file for the server that knows the answers
if test:
    result = evaluate_question_answering(model, processor, test, answer_list)
    if result.accuracy is None:
        write_evalai(Path(training.output_dir, "evalai.json"), test["question_id"], result.answers)
        print(f"{len(test)} answers for the server in {training.output_dir}/evalai.json")
    else:
        texts = (rows.remove_columns("image") for rows in (train, test))
        print(f"VQA accuracy:                          {result.accuracy:.3f} of {len(test)} questions")
        print(f"most frequent answer of the same type: {majority_answer_accuracy(*texts):.3f}")
