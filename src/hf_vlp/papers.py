"""What a model card says of each paper: its citation, its official code and that code's licence, its idea."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Paper:
    """A paper and its official code.

    `licence` is that of the official repository in the names of the Hub, `licence_source` the file that says
    so; the papers' weights carry no licence of their own. `objectives` are the losses of its pre-training, by
    their names in `LOSSES`, `task_losses` those of its heads that differ; `own_heads` are tasks that only
    this package has a head for.
    """

    name: str
    title: str
    authors: str
    venue: str
    year: int
    arxiv: str
    code: str
    licence: str
    licence_source: str
    idea: str
    objectives: tuple[str, ...]
    data: str
    task_losses: dict[str, tuple[str, ...]] = field(default_factory=dict)
    own_heads: tuple[str, ...] = ()

    @property
    def bibtex(self) -> str:
        key = self.name.lower().replace("-", "") + str(self.year)
        fields = {
            "title": f"{{{self.title}}}",
            "author": self.authors,
            "booktitle": self.venue,
            "year": self.year,
            "eprint": self.arxiv,
            "archivePrefix": "arXiv",
        }
        lines = "".join(f"  {name} = {{{value}}},\n" for name, value in fields.items())
        return f"@inproceedings{{{key},\n{lines}}}"


LOSSES = {
    "loss_itc": "image-text contrast: each text nearest to its own image, and the other way round",
    "loss_itm": "image-text matching: does the text belong to the image",
    "loss_mlm": "masked language modelling: the masked words, given the image",
    "loss_mvm": "masked visual modelling: the dictionary entries of masked cells",
    "loss_feature": "features of masked regions",
    "loss_object": "objects in masked regions",
    "loss_attribute": "attributes of masked regions",
    "loss_answer": "answers to questions about the image",
    "loss_bbox": "boxes, by their coordinates (L1)",
    "loss_giou": "boxes, by their overlap (GIoU)",
    "loss_region": "which of the regions is meant",
}

PAPERS = {
    "vlp_albef": Paper(
        name="ALBEF",
        title="Align before Fuse: Vision and Language Representation Learning with Momentum Distillation",
        authors="Li, Junnan and Selvaraju, Ramprasaath R. and Gotmare, Akhilesh Deepak and Joty, Shafiq and "
        "Xiong, Caiming and Hoi, Steven",
        venue="Advances in Neural Information Processing Systems",
        year=2021,
        arxiv="2107.07651",
        code="salesforce/ALBEF",
        licence="bsd-3-clause",
        licence_source="the headers of its files",
        idea="ALBEF aligns the features of a vision transformer and a text encoder by contrast before a "
        "fusion encoder mixes them, and learns from the soft targets of a momentum teacher beside labels.",
        objectives=("loss_itc", "loss_itm", "loss_mlm"),
        data="COCO, Visual Genome, SBU and CC3M (4M images), with CC12M 14M",
        task_losses={"grounding": ("loss_itc", "loss_itm")},
    ),
    "vlp_butd": Paper(
        name="BUTD",
        title="Bottom-Up and Top-Down Attention for Image Captioning and Visual Question Answering",
        authors="Anderson, Peter and He, Xiaodong and Buehler, Chris and Teney, Damien and Johnson, Mark and "
        "Gould, Stephen and Zhang, Lei",
        venue="IEEE Conference on Computer Vision and Pattern Recognition",
        year=2018,
        arxiv="1707.07998",
        code="peteanderson80/bottom-up-attention",
        licence="mit",
        licence_source="its README",
        idea="A Faster R-CNN trained on objects and attributes of Visual Genome, whose regions and features "
        "LXMERT reads in place of an image.",
        objectives=(),
        data="Visual Genome",
    ),
    "vlp_lxmert": Paper(
        name="LXMERT",
        title="LXMERT: Learning Cross-Modality Encoder Representations from Transformers",
        authors="Tan, Hao and Bansal, Mohit",
        venue="Conference on Empirical Methods in Natural Language Processing",
        year=2019,
        arxiv="1908.07490",
        code="airsplay/lxmert",
        licence="mit",
        licence_source="its LICENSE",
        idea="LXMERT reads a text by a language encoder, the regions of an image that a detector found by an "
        "object-relationship encoder, and both by a cross-modality encoder.",
        objectives=("loss_mlm", "loss_itm", "loss_feature", "loss_object", "loss_attribute", "loss_answer"),
        data="captions and questions of COCO, Visual Genome, VQA, GQA and VG-QA (180K images, 9.18M texts)",
        task_losses={"retrieval": ("loss_itm",), "grounding": ("loss_region", "loss_bbox", "loss_giou")},
        own_heads=("retrieval", "grounding", "entailment"),
    ),
    "vlp_soho": Paper(
        name="SOHO",
        title="Seeing Out of tHe bOx: End-to-End Pre-training for Vision-Language Representation Learning",
        authors="Huang, Zhicheng and Zeng, Zhaoyang and Huang, Yupan and Liu, Bei and Fu, Dongmei and "
        "Fu, Jianlong",
        venue="IEEE/CVF Conference on Computer Vision and Pattern Recognition",
        year=2021,
        arxiv="2104.03135",
        code="researchmm/soho",
        licence="apache-2.0",
        licence_source="its setup.py; the repository has no LICENSE file",
        idea="SOHO reads whole images by a CNN that is trained end to end, without a detector, and quantizes "
        "what it sees by a visual dictionary that follows it as a moving average.",
        objectives=("loss_mlm", "loss_mvm", "loss_itm"),
        data="captions of COCO and Visual Genome",
        task_losses={"retrieval": ("loss_itm",)},
        own_heads=("grounding",),
    ),
    "vlp_xvlm": Paper(
        name="X-VLM",
        title="Multi-Grained Vision Language Pre-Training: Aligning Texts with Visual Concepts",
        authors="Zeng, Yan and Zhang, Xinsong and Li, Hang",
        venue="International Conference on Machine Learning",
        year=2022,
        arxiv="2111.08276",
        code="zengyan-97/X-VLM",
        licence="bsd-3-clause",
        licence_source="its LICENSE",
        idea="X-VLM aligns a text with the visual concept that it describes, be it the image, a region or an "
        "object, all from one pass of the image trunk, and finds the box of that concept.",
        objectives=("loss_itc", "loss_itm", "loss_mlm", "loss_bbox", "loss_giou"),
        data="COCO, Visual Genome, SBU and CC3M (4M images), with CC12M, Objects365 and Open Images 16M",
    ),
}
