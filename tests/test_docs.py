"""README and docs: every Python block runs, in small; commands, links and anchors exist."""

import json
import re
import shutil
from pathlib import Path

import datasets
import pytest
from butd_reference import tiny_butd
from own_data import write_albef, write_karpathy, write_lines, write_photos, write_refer
from test_data_features import pixel_row, write_tsv
from test_data_nlvr import SCENE, draw
from tiny import tiny_soho_config
from tiny_extractors import save_detector, save_trunk
from tokenizers_of_languages import sentencepiece_tokenizer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    LxmertConfig,
    LxmertForQuestionAnswering,
    ResNetModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)
from typer.testing import CliRunner

from hf_vlp import (
    ALBEFConfig,
    ALBEFForGrounding,
    ALBEFForPreTraining,
    ALBEFForQuestionAnswering,
    ALBEFForVisualEntailment,
    ALBEFForVisualReasoning,
    ALBEFProcessor,
    LXMERTConfig,
    LXMERTForGrounding,
    LXMERTForPreTraining,
    LXMERTForQuestionAnswering,
    LXMERTForVisualReasoning,
    LXMERTProcessor,
    SOHOForGrounding,
    SOHOForPreTraining,
    SOHOForQuestionAnswering,
    SOHOForVisualEntailment,
    SOHOForVisualReasoning,
    SOHOImageProcessor,
    SOHOProcessor,
    VLPTextConfig,
    XVLMConfig,
    XVLMForCaptioning,
    XVLMForGrounding,
    XVLMForPreTraining,
    XVLMForQuestionAnswering,
    XVLMForVisualEntailment,
    XVLMForVisualReasoning,
    XVLMForWeakGrounding,
    XVLMImageProcessor,
    XVLMProcessor,
)
from hf_vlp.cli import app
from hf_vlp.data.shapes import vocabulary
from hf_vlp.quickstart import shapes_rows, tiny_config, tiny_processor, word_tokenizer
from hf_vlp.training import VLPTrainingArguments

ROOT = Path(__file__).parents[1]
PAGES = {str(page.relative_to(ROOT)): page for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]}
ALBEF = {
    "albef-base": ALBEFForPreTraining,
    "albef-vqa": ALBEFForQuestionAnswering,
    "albef-ve": ALBEFForVisualEntailment,
    "albef-nlvr": ALBEFForVisualReasoning,
    "albef-refcoco": ALBEFForGrounding,
}
XVLM = {
    "xvlm-base": XVLMForPreTraining,
    "xvlm-vqa": XVLMForQuestionAnswering,
    "xvlm-nlvr": XVLMForVisualReasoning,
    "xvlm-ve": XVLMForVisualEntailment,
    "xvlm-refcoco": XVLMForGrounding,
    "xvlm-weak": XVLMForWeakGrounding,
    "xvlm-caption": XVLMForCaptioning,
}
LXMERT = {
    "lxmert-base": LXMERTForPreTraining,
    "lxmert-vqa": LXMERTForQuestionAnswering,
    "lxmert-nlvr2": LXMERTForVisualReasoning,
    "lxmert-refcoco": LXMERTForGrounding,
}
SOHO = {
    "soho-base": SOHOForPreTraining,
    "soho-vqa": SOHOForQuestionAnswering,
    "soho-ve": SOHOForVisualEntailment,
    "soho-nlvr2": SOHOForVisualReasoning,
    "soho-refcoco": SOHOForGrounding,
}
ANSWERS = ["", "2", "blue", "no", "red", "woman", "yes"]
TEXT = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
COMMANDS = (
    "quickstart",
    "predict",
    "train",
    "evaluate",
    "demo",
    "extract",
    "index",
    "build",
    "search",
    "export-onnx",
    "convert",
    "albef",
    "butd",
    "lxmert",
    "soho",
    "xvlm",
)
SWIN = SwinConfig(image_size=224, embed_dim=4, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=7)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)


@pytest.fixture(scope="module")
def user_folder(tmp_path_factory) -> Path:
    """Small stand-ins under the names that the pages use."""
    folder = tmp_path_factory.mktemp("user")
    rows = shapes_rows(0)
    processor = tiny_processor(rows.words, rows.image_size)
    for model_class, name in ((XVLMForPreTraining, "pretrained"), (XVLMForGrounding, "grounding")):
        model_class(tiny_config(processor)).save_pretrained(folder / "quickstart" / name)
        processor.save_pretrained(folder / "quickstart" / name)
    rows.test_grounding[0]["image"].save(folder / "quickstart" / "scene.png")

    tokenizer = word_tokenizer(vocabulary())
    ends = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    layers = {"num_text_layers": 1, "num_fusion_layers": 1, "num_decoder_layers": 1}
    text = VLPTextConfig(vocab_size=len(tokenizer), **ends, **layers, **TEXT)
    for name, head in XVLM.items():
        head(XVLMConfig(vision_config=SWIN, text_config=text)).save_pretrained(folder / name)
        XVLMProcessor(XVLMImageProcessor(), tokenizer).save_pretrained(folder / name)
    SwinModel(SWIN).save_pretrained(folder / "microsoft" / "swin-base-patch4-window7-224-in22k")
    write_clip_and_xlm_roberta(folder)
    write_albef_models(folder, tokenizer)
    write_lxmert_models(folder, tokenizer)
    write_lxmert_data(folder)
    write_soho(folder, tokenizer)
    bert = BertConfig(vocab_size=len(tokenizer), num_hidden_layers=12, **TEXT)
    BertForMaskedLM(bert).save_pretrained(folder / "bert-base-uncased")

    write_photos(folder / "photos")
    write_albef(folder / "albef", folder / "photos")
    write_lines(folder / "lines" / "images" / "0.json", folder / "lines" / "regions.json")
    write_karpathy(folder / "finetune" / "coco_train.json", folder / "finetune" / "coco_test.json")
    write_refer(folder / "refcoco+" / "refs(unc).p", folder / "refcoco+" / "instances.json")
    write_nlvr(folder / "nlvr" / "dev")
    return folder


def write_clip_and_xlm_roberta(folder: Path) -> None:
    sizes = TEXT | {"num_hidden_layers": 1, "vocab_size": 40}
    clip = CLIPConfig(text_config=sizes, vision_config=sizes | {"patch_size": 16})
    CLIPModel(clip).save_pretrained(folder / "openai" / "clip-vit-base-patch16")
    tokenizer = sentencepiece_tokenizer(["Ein grünes Dreieck über einem Kreis."] * 2)
    sizes |= {"num_hidden_layers": 12, "vocab_size": len(tokenizer)}
    XLMRobertaForMaskedLM(XLMRobertaConfig(**sizes)).save_pretrained(folder / "xlm-roberta-base")
    tokenizer.save_pretrained(folder / "xlm-roberta-base")


def write_albef_models(folder: Path, tokenizer) -> None:
    vision = ViTConfig(num_hidden_layers=1, **TEXT)
    ViTModel(vision).save_pretrained(folder / "facebook" / "deit-base-patch16-224")
    ends = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    layers = {"num_text_layers": 1, "num_fusion_layers": 1, "num_decoder_layers": 1}
    text = VLPTextConfig(vocab_size=len(tokenizer), **ends, **layers, **TEXT)
    vision = ViTConfig(image_size=256, num_hidden_layers=1, **TEXT)
    config = ALBEFConfig(vision_config=vision, text_config=text, projection_dim=8, queue_size=16)
    for name, head in ALBEF.items():
        head(config).save_pretrained(folder / name)
        ALBEFProcessor.from_config(config, tokenizer).save_pretrained(folder / name)


def write_lxmert_models(folder: Path, tokenizer) -> None:
    """Models, and what finds regions: the detector with features of width 24, another one with as many."""
    tokenizer = BertTokenizer(vocab=tokenizer.get_vocab())  # which puts [CLS] and [SEP] around a text
    sizes = {**TEXT, "vocab_size": len(tokenizer), "l_layers": 1, "r_layers": 1, "x_layers": 2}
    sizes |= {"visual_feat_dim": 24, "num_qa_labels": len(ANSWERS)}
    for name, head in LXMERT.items():
        head(LXMERTConfig(**sizes, answers=ANSWERS)).save_pretrained(folder / name)
        LXMERTProcessor(tokenizer).save_pretrained(folder / name)
    native = folder / "unc-nlp" / "lxmert-vqa-uncased"
    LxmertForQuestionAnswering(LxmertConfig(**sizes)).save_pretrained(native)
    tokenizer.save_pretrained(native)
    detector = tiny_butd()
    detector.save_pretrained(folder / "butd")
    detector.image_processor.save_pretrained(folder / "butd")
    save_detector("detr", folder / "facebook" / "detr-resnet-50")
    save_trunk("vit", folder / "facebook" / "dinov2-base")


def write_lxmert_data(folder: Path) -> None:
    """LXMERT's files under their official names; the images are called 0 to 11."""
    places = range(12)
    rows = {"train2014": places[:6], "val2014": places[6:]}
    for name, images in rows.items():
        write_tsv(folder / f"{name}_obj36.tsv", {str(i): pixel_row(i, regions=36, dim=24) for i in images})
    sentences = {"mscoco": ["a red circle"], "vqa": ["what color is the circle", "is there a square"]}
    labels = {"vqa": [{"Red.": 1.0, "unheard of": 0.3}, {"yes": 1.0}]}
    questions = [
        {
            "img_id": str(i),
            "question_id": i,
            "sent": "what color is the circle",
            "label": {"red": 1.0, "blue": 0.3},
        }
        for i in places
    ]
    pairs = [
        {
            "img0": str(i),
            "img1": "0",
            "sent": "both images show a circle",
            "label": i % 2,
            "identifier": f"dev-1-{i}-0",
        }
        for i in places
    ]
    files = {
        "lxmert/all_ans": [{"ans": answer, "dsets": ["vqa", "gqa"]} for answer in ANSWERS[1:]],
        "lxmert/mscoco_train": [{"img_id": str(i), "sentf": sentences, "labelf": labels} for i in places],
        "vqa/train": questions,
        "vqa/minival": questions,
        "vqa/trainval_label2ans": ["", "1 world", "2", "the woman", "yes"],
        "gqa/train": [entry | {"question_id": str(entry["question_id"])} for entry in questions],
        "nlvr2/train": pairs,
    }
    for name, entries in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(entries))


def write_soho(folder: Path, tokenizer) -> None:
    """Models, the trunk of one, and SOHO's files about the photos."""
    answers = {"answers": ANSWERS, "num_answers": len(ANSWERS)}
    for name, head in SOHO.items():
        config = tiny_soho_config(
            vocab_size=len(tokenizer), num_labels=3, **answers if name == "soho-vqa" else {}
        )
        head(config).save_pretrained(folder / name)
        image_processor = SOHOImageProcessor(size={"shortest_edge": 100, "longest_edge": 200})
        SOHOProcessor(image_processor, tokenizer).save_pretrained(folder / name)
    ResNetModel(config.backbone_config).save_pretrained(folder / "microsoft" / "resnet-18")
    images = [{"file_name": f"{i % 4}.png", "image_id": i, "width": 64, "height": 48} for i in range(8)]
    captions = [image | {"captions": ["a red circle", "a blue square"]} for image in images]
    asked = {"question": "what color is the circle", "question_id": 0, "labels": [4], "scores": [1.0]}
    questions = {"data": [image | {"vqa": [asked]} for image in images], "label2ans": ANSWERS}
    files = {"coco_cap_train_pre": captions, "train_data_vqa": questions}
    (folder / "soho").mkdir()
    for name, content in files.items():
        (folder / "soho" / f"{name}.json").write_text(json.dumps(content))


def write_nlvr(split: Path) -> None:
    (split / "images" / "1").mkdir(parents=True)
    draw(SCENE, 0).save(split / "images" / "1" / "dev-1-0-0.png")
    example = {"sentence": "There is a tower.", "label": "true", "identifier": "1-0", "directory": "1"}
    (split / "dev.json").write_text(json.dumps(example | {"structured_rep": SCENE}))


@pytest.fixture
def short_training(monkeypatch):
    """Two steps of four rows, whatever a page asks for."""
    set_up = VLPTrainingArguments.__post_init__

    def shorten(self):
        self.max_steps, self.per_device_train_batch_size, self.per_device_region_batch_size = 2, 4, 2
        self.use_cpu, self.bf16, self.disable_tqdm = True, False, True
        set_up(self)

    monkeypatch.setattr(VLPTrainingArguments, "__post_init__", shorten)


ON_THE_HUB = "docs/hub.md"  # its blocks run in test_hub_training.py, with a Hub


@pytest.mark.parametrize(
    "name", [name for name, page in PAGES.items() if blocks(page, "python") and name != ON_THE_HUB]
)
def test_python_blocks_run(name, user_folder, tmp_path, monkeypatch, short_training):
    folder = tmp_path / "user"
    shutil.copytree(user_folder, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    names: dict = {}
    for block in blocks(PAGES[name], "python"):
        exec(compile(block, name, "exec"), names)


@pytest.mark.parametrize("name", PAGES)
def test_commands_exist(name):
    for line in "".join(blocks(PAGES[name], "bash")).replace("\\\n", " ").splitlines():
        for script in re.findall(r"\b(?:examples|benchmarks|tests)/\S+", line):
            assert (ROOT / script).exists(), script
        for command in re.findall(r"hf-vlp (export-onnx|(?:[a-z]+ ?)+)", line):
            words = [word for word in command.split() if word in COMMANDS]
            page = CliRunner().invoke(app, [*words, "--help"], terminal_width=200)
            assert page.exit_code == 0 and words, command
            for option in re.findall(r"--[a-z-]+", line.partition("hf-vlp")[2]):
                assert option in page.output, f"{option} in {line}"


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    page = PAGES[name]
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), flags=re.M)
            assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, target


def test_every_page_is_in_the_table_of_contents():
    contents = re.search(r"```{toctree}\n(.*?)```", PAGES["docs/index.md"].read_text(), flags=re.S)[1]
    listed = {line for line in contents.split() if not line.startswith(":")}
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"} == listed
