"""How to use a model of a folder or repository, as code that runs as it stands: what model cards show."""

_IMAGE = """image = Image.new("RGB", (320, 240), "orange")  # or "photo.jpg"
"""
_REGIONS = """regions = {{  # what a detector finds in an image; see hf-vlp extract
    "features": torch.rand(36, {width}),
    "boxes": torch.tensor([[0.1, 0.2, 0.6, 0.8]]).repeat(36, 1),  # x1, y1, x2, y2 in 0..1
    "image_size": torch.tensor([240, 320]),
}}
"""


def predict(model, name: str, task: str, text: str) -> str:
    """By `hf_vlp.predict`."""
    imports, visual, prepare = _visual(model)
    images = ", ".join([visual] * (2 if task == "reasoning" else 1))
    answers, classes = "", _num_answers(model)
    if task == "vqa" and classes is not None and model.config.answers is None:
        prepare += f'answers = [f"answer {{i}}" for i in range({classes})]  # in place of its own\n'
        answers = ", answers=answers"
    return (
        f"import hf_vlp\n{imports}from transformers import AutoProcessor\n\n"
        f'model = hf_vlp.load_head("{task}", "{name}")\n'
        f'processor = AutoProcessor.from_pretrained("{name}")\n{prepare}'
        f'print(hf_vlp.predict("{task}", model, processor, [{images}], ["{text}"]{answers}))\n'
    )


def read(model, name: str, with_package: bool) -> str:
    """By the Auto classes: what the head says, or where that takes more than images and texts, the features
    that it starts from."""
    imports, visual, prepare = _visual(model)
    trust = "" if with_package else ", trust_remote_code=True"
    loading = (
        ("import hf_vlp  # makes the Auto classes know it\n" if with_package else "")
        + f"{imports}from transformers import AutoModel, AutoProcessor\n\n"
        f'model = AutoModel.from_pretrained("{name}"{trust})\n'
        f'processor = AutoProcessor.from_pretrained("{name}"{trust})\n'
    )
    argument = "regions" if visual == "regions" else "images"
    texts = 'text=["a red circle"], return_tensors="pt"'
    head = model.auto_class.removeprefix("AutoModel")
    if head == "ForTextAssignment":
        return loading
    if head == "ForCaptioning":
        return (
            f"{loading}{prepare}"
            'inputs = processor(images=[image], text="a picture of", return_tensors="pt")\n'
            "print(processor.decode_captions(model.generate(**inputs, num_beams=3)))\n"
        )
    if head == "ForVisualReasoning":
        return (
            f"{loading}{prepare}inputs = processor({argument}=[{visual}, {visual}], {texts})\n"
            "pairs = {key: value[None] if len(value) == 2 else value for key, value in inputs.items()}\n"
            "print(model(**pairs).logits)\n"
        )
    chooses = head == "ForVisualQuestionAnswering" and _num_answers(model) is not None
    speaks = chooses or head in ("ForGrounding", "ForVisualEntailment")
    return (
        f"{loading}{prepare}inputs = processor({argument}=[{visual}], {texts})\n"
        f"outputs = {'model' if speaks else 'model.base_model'}(**inputs)\n"
        "print({key: value.shape for key, value in outputs.items()})\n"
    )


def start(task: str, name: str) -> str:
    """A head of another task, to be trained from these weights."""
    return f'import hf_vlp\n\nmodel = hf_vlp.load_head("{task}", "{name}", needs_weights=False)\n'


def detect(name: str) -> str:
    """Regions of an image."""
    return (
        "from PIL import Image\n\nfrom hf_vlp.models.region_extractors import load_extractor\n\n"
        f'extractor = load_extractor("{name}")\n{_IMAGE}'
        "regions = extractor.extract([image])\nprint(regions.features.shape, regions.boxes.shape)\n"
    )


def _visual(model) -> tuple[str, str, str]:
    """What the model looks at: an import, its name, and the lines that make one."""
    width = getattr(model.config, "visual_feat_dim", None)
    if width is None:
        return "from PIL import Image\n", "image", _IMAGE
    return "import torch\n", "regions", _REGIONS.format(width=width)


def _num_answers(model) -> int | None:
    """Those that LXMERT and SOHO choose from; None of models that write theirs."""
    return getattr(model.config, "num_qa_labels", getattr(model.config, "num_answers", None))
