"""Tiny models and batches that the tests share."""

import torch
from transformers import (
    BertTokenizer,
    CLIPVisionConfig,
    ResNetConfig,
    SwinConfig,
    TimmWrapperConfig,
    ViTConfig,
)

from hf_vlp import (
    ALBEFConfig,
    ALBEFImageProcessor,
    ALBEFProcessor,
    LXMERTConfig,
    LXMERTProcessor,
    SOHOConfig,
    SOHOImageProcessor,
    SOHOProcessor,
    XVLMConfig,
    XVLMImageProcessor,
    XVLMProcessor,
)

WORDS = "a an the red green blue yellow circle square triangle cross left right top bottom of and is".split()
IMAGE_SIZE, STRIDE = 32, 16
NUM_PATCHES = (IMAGE_SIZE // STRIDE) ** 2

TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_text_layers": 2,
    "num_fusion_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 24,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
TRUNKS = {
    "swin": lambda: SwinConfig(
        image_size=IMAGE_SIZE, patch_size=4, embed_dim=8, depths=[1, 2, 1], num_heads=[1, 2, 2], window_size=4
    ),
    "vit": lambda: ViTConfig(
        image_size=IMAGE_SIZE,
        patch_size=STRIDE,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    ),
    "clip": lambda: CLIPVisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=STRIDE,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    ),
    "timm": lambda: TimmWrapperConfig(
        architecture="vit_tiny_patch16_224",
        num_classes=0,
        model_args={"img_size": IMAGE_SIZE, "embed_dim": 16, "depth": 2, "num_heads": 2},
    ),
}


def tiny_config(trunk: str = "swin", **fields) -> XVLMConfig:
    return XVLMConfig(vision_config=TRUNKS[trunk](), text_config=dict(TEXT), projection_dim=8, **fields)


ROBERTA = {"position_offset": 2, "pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5}


def tiny_clip_config(trunk: str = "clip", **fields) -> XVLMConfig:
    """X-VLM with a CLIP trunk and a RoBERTa."""
    return XVLMConfig(vision_config=TRUNKS[trunk](), text_config=TEXT | ROBERTA, projection_dim=8, **fields)


def tiny_albef_config(trunk: str = "vit", **fields) -> ALBEFConfig:
    settings = {"projection_dim": 8, "queue_size": 6, **fields}
    return ALBEFConfig(vision_config=TRUNKS[trunk](), text_config=dict(TEXT), **settings)


REGIONS, FEATURE_DIM = 5, 12


def tiny_lxmert_config(**fields) -> LXMERTConfig:
    geometry = {name: TEXT[name] for name in TEXT if not name.startswith("num_") and "token" not in name}
    sizes = {"l_layers": 2, "r_layers": 1, "x_layers": 2, "num_attention_heads": 2}
    classes = {"num_object_labels": 7, "num_attr_labels": 5, "num_qa_labels": 6}
    return LXMERTConfig(**geometry | sizes | classes | {"visual_feat_dim": FEATURE_DIM} | fields)


CANVAS = 128  # pixels a side, 2 x 2 cells of SOHO's grid


def tiny_soho_config(trunk: str = "resnet", **fields) -> SOHOConfig:
    geometry = {name: TEXT[name] for name in TEXT if not name.startswith("num_") and "token" not in name}
    trunks = {
        "resnet": lambda: ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8, 12, 16], depths=[1, 1, 1, 1], layer_type="basic"
        ),
        "timm": lambda: TimmWrapperConfig(
            architecture="resnet18", num_classes=0, model_args={"channels": (8, 8, 12, 16), "stem_width": 8}
        ),
    }
    sizes = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vd_size": 6,
        "num_answers": 6,
        "mvm_weight": 0.1,
    }
    if trunk != "resnet":
        sizes["frozen_stages"] = -1
    return SOHOConfig(**geometry | sizes | {"backbone_config": trunks[trunk]()} | fields)


def tiny_tokenizer() -> BertTokenizer:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)})


def tiny_processor() -> XVLMProcessor:
    image_processor = XVLMImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    return XVLMProcessor(image_processor, tiny_tokenizer(), max_tokens=20, patch_size=STRIDE)


def tiny_albef_processor() -> ALBEFProcessor:
    image_processor = ALBEFImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    return ALBEFProcessor(image_processor, tiny_tokenizer(), max_tokens=20)


def tiny_lxmert_processor(extractor=None) -> LXMERTProcessor:
    return LXMERTProcessor(tiny_tokenizer(), extractor=extractor)


def tiny_soho_processor() -> SOHOProcessor:
    return SOHOProcessor(
        SOHOImageProcessor(size={"shortest_edge": 100, "longest_edge": 200}), tiny_tokenizer()
    )


def text_batch(rows: int, length: int = 7, padding: int = 0, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random texts of `length` tokens, each but the first shorter by one, and `padding` slots of no use."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, TEXT["vocab_size"], (rows, length), generator=generator)
    ids[:, 0] = 2
    mask = torch.ones_like(ids)
    mask[1:, -1] = 0
    pad = torch.zeros(rows, padding, dtype=torch.long)
    return {"input_ids": torch.cat([ids * mask, pad], 1), "attention_mask": torch.cat([mask, pad], 1)}


def masked_batch(texts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The texts with words 1 and 3 masked."""
    labels = torch.full_like(texts["input_ids"], -100)
    labels[:, [1, 3]] = texts["input_ids"][:, [1, 3]]
    masked = texts["input_ids"].masked_fill(labels != -100, 4)
    return {"mlm_input_ids": masked, "mlm_labels": labels}


def image_batch(images: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)}


def pretraining_batch(rows: int = 4, padding: int = 0) -> dict[str, torch.Tensor]:
    texts = text_batch(rows, padding=padding)
    roll = torch.arange(rows).roll(1)
    return {
        **image_batch(rows), **texts, **masked_batch(texts),
        "negative_image_index": roll, "negative_text_index": roll,
    }  # fmt: skip


def region_batch(padding: int = 0) -> dict[str, torch.Tensor]:
    """Two images, four regions, the last of which is a whole image."""
    mask = torch.zeros(4, NUM_PATCHES, dtype=torch.bool)
    mask[0, 0] = mask[1, 1:3] = mask[2, -1] = mask[3] = True
    return {
        **pretraining_batch(4, padding),
        **image_batch(2),
        "region_image_index": torch.tensor([0, 0, 1, 1]),
        "region_patch_mask": mask,
        "target_boxes": torch.tensor(
            [[0.2, 0.2, 0.3, 0.3], [0.6, 0.5, 0.4, 0.8], [0.8, 0.8, 0.2, 0.2], [0.5, 0.5, 1, 1]]
        ),
        "is_full_image": torch.tensor([False, False, False, True]),
    }


def retrieval_batch(padding: int = 0, rows: int = 4) -> dict[str, torch.Tensor]:
    """The first two pairs show the same image."""
    roll = torch.arange(rows).roll(-2)
    return {
        **image_batch(rows), **text_batch(rows, padding=padding),
        "image_ids": torch.arange(rows).clamp(min=1),
        "negative_image_index": roll, "negative_text_index": roll,
    }  # fmt: skip


def grounding_batch(padding: int = 0) -> dict[str, torch.Tensor]:
    batch = region_batch(padding)
    names = ("pixel_values", "input_ids", "attention_mask", "region_image_index", "target_boxes")
    return {name: batch[name] for name in names}


def answer_batch(padding: int = 0, rows: int = 4) -> dict[str, torch.Tensor]:
    """Questions with one answer each, and the last with a second one."""
    lengths = torch.arange(rows + 1) % 3 + 1  # one to three words
    answers = torch.zeros(rows + 1, 5 + padding, dtype=torch.long)
    answers[:, 0] = 2
    for answer, length in enumerate(lengths.tolist()):
        answers[answer, 1 : 1 + length] = torch.arange(length) + 7 + 3 * answer
        answers[answer, 1 + length] = 3
    weights = torch.ones(rows + 1)
    weights[-2:] = torch.tensor([0.7, 0.3])
    return {
        **image_batch(rows),
        **text_batch(rows, padding=padding),
        "answer_input_ids": answers,
        "answer_attention_mask": (answers != 0).long(),
        "answer_question_index": torch.arange(rows + 1).clamp(max=rows - 1),
        "answer_weights": weights,
    }


def caption_batch(padding: int = 0, rows: int = 4) -> dict[str, torch.Tensor]:
    """Two captions of each image, [CLS] and a word as their prompt."""
    batch = {**image_batch(rows // 2), **text_batch(rows, padding=padding)}
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :2] = -100
    return {**batch, "labels": labels}


def entailment_batch(padding: int = 0, rows: int = 4) -> dict[str, torch.Tensor]:
    """Two sentences on each image."""
    return {
        **image_batch(rows // 2),
        **text_batch(rows, padding=padding),
        "labels": torch.arange(rows) % 3,
        "image_index": torch.arange(rows) // 2,
    }


def reasoning_batch(padding: int = 0, rows: int = 4) -> dict[str, torch.Tensor]:
    pairs = image_batch(2 * rows)["pixel_values"].unflatten(0, (rows, 2))
    return {"pixel_values": pairs, **text_batch(rows, padding=padding), "labels": torch.arange(rows) % 2}


def assignment_batch(padding: int = 0, rows: int = 4) -> dict[str, torch.Tensor]:
    own = torch.arange(rows)
    return {
        **image_batch(rows), **text_batch(rows, padding=padding), "labels": own % 3,
        "negative_image_index": torch.stack([own.roll(1), own.roll(2)], 1),
    }  # fmt: skip


def region_rows(images: int, seed: int = 0, regions: int = REGIONS) -> list[dict]:
    """Regions of each image as an extractor gives them, the last image with one less."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for image in range(images):
        count = regions - (image == images - 1)
        corners = torch.rand(count, 2, 2, generator=generator).sort(dim=1).values  # (R, corner, x and y)
        rows.append(
            {
                "features": torch.randn(count, FEATURE_DIM, generator=generator),
                "boxes": corners.flatten(1),
                "object_ids": torch.randint(7, (count,), generator=generator),
                "object_scores": torch.rand(count, generator=generator),
                "attribute_ids": torch.randint(5, (count,), generator=generator),
                "attribute_scores": torch.rand(count, generator=generator),
                "image_size": torch.tensor([30, 40]),
            }
        )
    return rows


def visual_batch(images: int, padding: int = 0) -> dict[str, torch.Tensor]:
    """Regions of which the last image has one less, and `padding` slots with features that say nothing."""
    return pad_regions(region_rows(images), padding)


def pad_regions(rows: list[dict], padding: int) -> dict[str, torch.Tensor]:
    batch = dict(tiny_lxmert_processor()(regions=rows))
    for name, value in batch.items():
        slots = torch.full((len(rows), padding, *value.shape[2:]), 0 if "mask" in name else 0.5)
        batch[name] = torch.cat([value, slots.to(value.dtype)], dim=1)
    return batch


def visual_text_batch(padding: int = 0, rows: int = 4) -> dict[str, torch.Tensor]:
    return {**visual_batch(rows, padding), **text_batch(rows, padding=padding)}


def lxmert_pretraining_batch(padding: int = 0, rows: int = 4) -> dict[str, torch.Tensor]:
    """The last row is a caption of another image, and none of its business is to answer."""
    texts, visual = text_batch(rows, padding=padding), visual_batch(rows, padding)
    there = visual["visual_attention_mask"].bool()
    masked = there & (torch.arange(there.shape[1]) % 2 == 0)
    regions = torch.arange(there.numel()).view_as(there)
    target = visual["visual_feats"]
    return {
        **visual,
        **masked_batch(texts),
        "attention_mask": texts["attention_mask"],
        "visual_feats": target.masked_fill(masked[..., None], 0),
        "itm_labels": (torch.arange(rows) < rows - 1).long(),
        "region_mask": masked,
        "target_feats": target,
        "object_ids": torch.where(there, regions // there.shape[1] + 1, 0),
        "object_scores": torch.full(there.shape, 0.5),
        "attribute_ids": torch.where(there, regions // there.shape[1] % 5, 0),
        "attribute_scores": torch.full(there.shape, 0.25),
        "answer_labels": torch.arange(rows).masked_fill(torch.arange(rows) == rows - 1, -100),
    }


def soft_answer_batch(padding: int = 0, rows: int = 4) -> dict[str, torch.Tensor]:
    """Two questions on each image; the first has two answers that are right."""
    labels = torch.eye(6)[torch.arange(rows) % 6]
    labels[0, 4] = 1.0
    index = {"image_index": torch.arange(rows) // 2}
    return {
        **visual_batch(rows // 2, padding),
        **text_batch(rows, padding=padding),
        "labels": labels,
        **index,
    }


def visual_entailment_batch(padding: int = 0, rows: int = 4) -> dict[str, torch.Tensor]:
    batch = soft_answer_batch(padding, rows)
    return batch | {"labels": torch.arange(rows) % 3}


def visual_pair_batch(padding: int = 0, rows: int = 4) -> dict[str, torch.Tensor]:
    pairs = {name: value.unflatten(0, (rows, 2)) for name, value in visual_batch(2 * rows, padding).items()}
    return {**pairs, **text_batch(rows, padding=padding), "labels": torch.arange(rows) % 2}


def visual_retrieval_batch(padding: int = 0, rows: int = 4) -> dict[str, torch.Tensor]:
    roll = torch.arange(rows).roll(1)
    return {
        **visual_text_batch(padding, rows),
        "image_ids": torch.arange(rows),
        "negative_image_index": roll, "negative_text_index": roll,
    }  # fmt: skip


def visual_grounding_batch(padding: int = 0) -> dict[str, torch.Tensor]:
    """Two texts on each of two images, whose regions are the cells of a 2 x 2 grid; boxes are a little
    off."""
    corners = torch.tensor([[x, y, x + 0.5, y + 0.5] for y in (0, 0.5) for x in (0, 0.5)])
    rows = region_rows(3)[:2]
    rows = [row | {"features": row["features"][:4], "boxes": corners} for row in rows]
    rows = [{name: row[name] for name in ("features", "boxes", "image_size")} for row in rows]
    targets = torch.tensor([[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]])
    return {
        **pad_regions(rows, padding),
        **text_batch(4, padding=padding),
        "target_boxes": torch.cat([targets + 0.02, torch.full((4, 2), 0.46)], dim=1),
        "region_image_index": torch.tensor([0, 0, 1, 1]),
    }


def canvas_batch(images: int) -> dict[str, torch.Tensor]:
    """Images of colours of their own, of which the last is narrower than the canvas."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, 3, CANVAS, CANVAS, generator=generator)
    pixels = pixels + 3 * torch.randn(images, 3, 1, 1, generator=generator)
    mask = torch.ones(images, CANVAS, CANVAS, dtype=torch.bool)
    mask[-1, :, 90:] = False
    return {"pixel_values": pixels * mask[:, None], "pixel_mask": mask}


def canvas_text_batch(padding: int = 0, rows: int = 4) -> dict[str, torch.Tensor]:
    return {**canvas_batch(rows), **text_batch(rows, padding=padding)}


def soho_pretraining_batch(padding: int = 0, rows: int = 4) -> dict[str, torch.Tensor]:
    """Two texts on each image, one of which belongs to it; cells are masked for the first."""
    texts = text_batch(rows, padding=padding)
    return {
        **canvas_batch(rows // 2),
        **masked_batch(texts),
        "attention_mask": texts["attention_mask"],
        "itm_labels": torch.arange(rows) % 2,
        "mvm_cells": torch.where(torch.arange(rows) % 2 == 0, 1, -1),
    }


def canvas_answer_batch(padding: int = 0, rows: int = 4) -> dict[str, torch.Tensor]:
    """Two questions on each image."""
    texts, index = text_batch(rows, padding=padding), {"image_index": torch.arange(rows) // 2}
    return {**canvas_batch(rows // 2), **texts, "labels": torch.eye(6)[torch.arange(rows) % 6], **index}


def canvas_entailment_batch(padding: int = 0, rows: int = 4) -> dict[str, torch.Tensor]:
    return canvas_answer_batch(padding, rows) | {"labels": torch.arange(rows) % 3}


def canvas_pair_batch(padding: int = 0, rows: int = 4) -> dict[str, torch.Tensor]:
    pairs = {name: value.unflatten(0, (rows, 2)) for name, value in canvas_batch(2 * rows).items()}
    return {**pairs, **text_batch(rows, padding=padding), "labels": torch.arange(rows) % 2}


def canvas_retrieval_batch(padding: int = 0, rows: int = 4) -> dict[str, torch.Tensor]:
    roll = torch.arange(rows).roll(1)
    return {
        **canvas_text_batch(padding, rows),
        "image_ids": torch.arange(rows),
        "negative_image_index": roll, "negative_text_index": roll,
    }  # fmt: skip


def canvas_grounding_batch(padding: int = 0, rows: int = 4) -> dict[str, torch.Tensor]:
    boxes = torch.tensor(
        [[0.3, 0.3, 0.2, 0.2], [0.6, 0.5, 0.4, 0.8], [0.8, 0.8, 0.2, 0.2], [0.5, 0.5, 0.9, 0.9]]
    )
    index = {"region_image_index": torch.arange(rows) // 2}
    return {**canvas_batch(rows // 2), **text_batch(rows, padding=padding), "target_boxes": boxes, **index}
