"""Sharing while training, branches and shards, and the cards that go along."""

import pytest
from heads import make_head
from hub_server import ROOT, Fault, run_client
from huggingface_hub import ModelCard
from tiny import tiny_albef_config

from hf_vlp import ALBEFForTextAssignment, XVLMForGrounding
from hf_vlp.cards import CARD_MARK, make_card, write_card
from hf_vlp.models.auto import MODELS
from hf_vlp.papers import LOSSES, PAPERS

TRAIN = """
import datasets, json, sys
from pathlib import Path
import torch
from heads import make_head
from huggingface_hub import snapshot_download
from tiny import image_batch
from hf_vlp import XVLMForGrounding, VLPTrainer, VLPTrainingArguments

def make_trainer(name, folder, **fields):
    torch.manual_seed(0)
    model, processor = make_head(XVLMForGrounding)
    rows = datasets.Dataset.from_dict(
        {"input_ids": [[2, 5, 8]] * 4, "pixel_values": image_batch(4)["pixel_values"]}
    )
    rows = rows.add_column("target_boxes", [[0.5, 0.5, 0.2, 0.2]] * 4)
    fields = {"max_steps": 3, "save_steps": 1, "logging_steps": 1, "learning_rate": 1e-3} | fields
    arguments = VLPTrainingArguments(
        f"{sys.argv[1]}/{folder}", use_cpu=True, disable_tqdm=True, per_device_train_batch_size=2,
        push_to_hub=True, hub_model_id=f"training/{name}", hub_always_push=True, **fields
    )
    return VLPTrainer(model, arguments, train_dataset=rows, eval_dataset=rows, processing_class=processor)

every_save = make_trainer("every-save", "a", hub_strategy="every_save")
every_save.train()
every_save.evaluate()
every_save.push_to_hub(dataset="two squares", metrics={"accuracy": 0.25}, license="mit")

make_trainer("checkpoint", "b", hub_strategy="checkpoint", max_steps=2, lr_scheduler_type="constant").train()
folder = snapshot_download("training/checkpoint", allow_patterns="last-checkpoint/*")
again = make_trainer("resumed", "c", hub_strategy="end", lr_scheduler_type="constant")
again.train(resume_from_checkpoint=f"{folder}/last-checkpoint")
whole = make_trainer("whole", "d", hub_strategy="end", lr_scheduler_type="constant")
whole.train()
equal = [torch.equal(a, b) for a, b in zip(again.model.parameters(), whole.model.parameters())]

make_trainer("flaky", "e", hub_strategy="every_save").train()  # its first two pushes fail
print(json.dumps({"equal": all(equal), "step": again.state.global_step}))
"""


def test_the_trainer_pushes_on_its_way(hub, tmp_path):
    hub.faults += [
        Fault("POST", "^/api/models/training/flaky/commit/", times=1, status=500),
        Fault("HEAD", "^/training/flaky/resolve/main/README.md", times=1, status=403, after=1),
    ]
    told = run_client(hub, TRAIN, tmp_path, tmp_path)
    assert told["equal"] and told["step"] == 3
    assert hub.repos["training/flaky"].titles == ["initial commit", "Training in progress, step 3"]

    repo = hub.repos["training/every-save"]
    steps = [f"Training in progress, step {step}" for step in (1, 2, 3)]
    assert repo.titles == ["initial commit", *steps, "End of training"]
    shas = list(repo.commits)
    for sha in shas[1:]:  # each is whole
        assert {"model.safetensors", "config.json", "modeling_xvlm.py", "README.md"} <= repo.commits[
            sha
        ].keys()
        assert b"auto_map" in hub.read(repo.name, "config.json", sha)
        assert "processor_config.json" in repo.commits[sha] and "last-checkpoint" not in str(
            repo.commits[sha]
        )
    weights = {repo.commits[sha]["model.safetensors"].sha256 for sha in shas[1:]}
    assert len(weights) == 3  # the last two are the same

    card = ModelCard(hub.read(repo.name, "README.md").decode())
    metrics = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert metrics["accuracy"] == 0.25 and metrics.keys() >= {"loss", "loss_bbox", "loss_giou"}
    assert card.data.eval_results[0].dataset_name == "two squares" and card.data.license == "mit"
    for line in (
        "| steps | 3 |",
        "| rows of a step | 2 |",
        "| learning rate | 0.001 |",
        "| last loss_bbox |",
    ):
        assert line in card.text, line

    files = hub.repos["training/checkpoint"].files()
    assert {"model.safetensors", "last-checkpoint/optimizer.pt", "last-checkpoint/model.safetensors"} <= set(
        files
    )
    assert not [path for path in files if path.startswith("last-checkpoint/modeling")]


OWN_CARDS = """
from heads import make_head
from hf_vlp import XVLMForGrounding, VLPTrainer, VLPTrainingArguments
import sys
model, processor = make_head(XVLMForGrounding)
for name in ("anew", "written"):
    processor.push_to_hub(f"cards/{name}")
    model.push_to_hub(f"cards/{name}", tags=["shapes"])
    arguments = VLPTrainingArguments(f"{sys.argv[1]}/{name}", use_cpu=True, hub_model_id=f"cards/{name}")
    VLPTrainer(model, arguments, processing_class=processor).push_to_hub()
model = XVLMForGrounding.from_pretrained("cards/anew")
arguments = VLPTrainingArguments(f"{sys.argv[1]}/later", use_cpu=True, hub_model_id="cards/later")
VLPTrainer(model, arguments, processing_class=processor).push_to_hub()
"""


def test_a_persons_card_is_never_overwritten(hub, tmp_path):
    own = b"---\nlicense:   mit  # mine\n---\nMy model.\n"
    hub.write("cards/written", {"README.md": own})
    run_client(hub, OWN_CARDS, tmp_path, tmp_path)
    assert hub.read("cards/written", "README.md") == own
    assert "model.safetensors" in hub.repos["cards/written"].files()
    repo = hub.repos["cards/anew"]
    assert [("README.md" in files) for files in repo.commits.values()] == [False, False, True, True]
    before_training, after = (
        hub.read(repo.name, "README.md", sha).decode() for sha in list(repo.commits)[-2:]
    )
    assert "- shapes" in before_training and "| recipe |" not in before_training
    assert "| recipe |" in after and CARD_MARK in after
    assert ModelCard(hub.read("cards/later", "README.md").decode()).data.base_model == "cards/anew"


BRANCHES = """
import json, sys
import torch
from heads import make_head
from hf_vlp import AutoModelForGrounding, XVLMForGrounding
model, _ = make_head(XVLMForGrounding)
bias = model.bbox_head.fc2.bias

def push(number, **options):
    torch.nn.init.constant_(bias, number)
    model.push_to_hub("org/branches", **options)

def pulled(**options):
    return AutoModelForGrounding.from_pretrained("org/branches", **options).bbox_head.fc2.bias[0].item()

push(1)
push(2, revision="v2", max_shard_size="50KB")
found = [pulled(), pulled(revision="v2")]
push(3, max_shard_size="50KB")
found.append(pulled())
push(4)
found.append(pulled())
print(json.dumps({"found": found}))
"""


def test_branches_and_shards_hold_what_was_pushed_last(hub, tmp_path):
    assert run_client(hub, BRANCHES, tmp_path)["found"] == [1, 2, 3, 4]
    repo = hub.repos["org/branches"]
    of_branch, of_main = (
        {path for path in repo.files(branch) if path.startswith("model") and "safetensors" in path}
        for branch in ("v2", "main")
    )
    assert of_main == {"model.safetensors"}
    assert "model.safetensors.index.json" in of_branch and len(of_branch) > 3
    assert not [path for files in repo.commits.values() for path in files if path.endswith(".bin")]


def test_every_model_has_a_card_and_every_loss_a_word():
    assert set(PAPERS) == {config.model_type for config in MODELS}
    for paper in PAPERS.values():
        names = {name for losses in paper.task_losses.values() for name in losses}
        assert names | set(paper.objectives) <= set(LOSSES)
        assert paper.arxiv in paper.bibtex and paper.title in paper.bibtex


def test_a_card_tells_where_weights_come_from():
    model, _ = make_head(XVLMForGrounding)
    own = make_card(model, "org/own")
    assert own.data.license == "unknown" and "## Origin" not in own.text and "## Results" not in own.text
    counts = {"keys_used": 3, "keys_dropped": 2, "keys_missing": 0}
    model.config.converted_from = {"file": "refcoco.th", "sha256": "ab" * 32, **counts}
    converted = make_card(model, "org/converted")
    assert converted.data.license == "bsd-3-clause" and "3 used, 2 dropped, 0 missing" in converted.text
    assert "`refcoco.th`" in converted.text and "ab" * 32 in converted.text
    assert converted.data.pipeline_tag == "zero-shot-object-detection"
    assert converted.data.library_name == "transformers"
    text = make_card(model, licence="mit", tags=["x"], metrics={"r@1": 0.5}, dataset="Flickr30K test")
    assert text.data.base_model is None
    model.name_or_path = "org/start"
    assert make_card(model, training={"steps": 1}).data.base_model == "org/start"
    assert text.data.license == "mit" and "x" in text.data.tags
    assert (text.data.eval_results[0].metric_type, text.data.eval_results[0].dataset_type) == (
        "r_1",
        "flickr30k-test",
    )


def test_cards_of_what_has_no_prediction():
    model = ALBEFForTextAssignment(tiny_albef_config(momentum_teacher=False))
    assert 'load_head("reasoning", "ORG/NAME", needs_weights=False)' in make_card(model).text


def test_a_metric_that_is_no_number_is_refused():
    model, _ = make_head(XVLMForGrounding)
    with pytest.raises(ValueError, match="accuracy='high'"):
        make_card(model, metrics={"accuracy": "high"})


def test_write_card_keeps_what_a_person_wrote(tmp_path):
    model, _ = make_head(XVLMForGrounding)
    path = write_card(model, tmp_path, "org/a")
    assert "# a" in path.read_text()
    write_card(model, tmp_path, "org/b")
    assert "# b" in path.read_text()
    path.write_text(path.read_text().replace(CARD_MARK, ""))
    write_card(model, tmp_path, "org/c")
    assert "# b" in path.read_text()


DOCS = """
import re, sys
from pathlib import Path
from hf_vlp import XVLMForGrounding
from hf_vlp.quickstart import shapes_rows, tiny_config, tiny_processor
rows = shapes_rows(0)
processor = tiny_processor(rows.words, rows.image_size)
XVLMForGrounding(tiny_config(processor)).save_pretrained("quickstart/grounding")
processor.save_pretrained("quickstart/grounding")
rows.test_grounding[0]["image"].save("quickstart/scene.png")
page = Path(sys.argv[1]).read_text(encoding="utf-8")
names = {}
for block in re.findall("^```python\\n(.*?)^```", page, flags=re.M | re.S):
    block = block.replace("max_steps=300", "max_steps=2, use_cpu=True")
    block = block.replace("save_steps=100", "save_steps=1")
    block = block.replace("per_device_train_batch_size=64", "per_device_train_batch_size=4")
    exec(compile(block, sys.argv[1], "exec"), names)
"""


def test_the_page_on_the_hub_runs(hub, tmp_path):
    run_client(hub, DOCS, tmp_path, ROOT / "docs" / "hub.md")
    assert {"model.safetensors", "modeling_xvlm.py", "README.md"} <= hub.repos["ORG/NAME"].files().keys()
    assert b"256 drawn scenes" in hub.read("ORG/SHARED", "README.md")
