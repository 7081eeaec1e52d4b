"""How the papers trained, as ready arguments.

    args = recipe("xvlm_retrieval_coco", "out", per_device_train_batch_size=32)

Every recipe is faithful: the official optimizer with its decay, batches per GPU and numbers of steps as
published. What a recipe leaves to you: the number of processes (comments give the global batch), mixed
precision (X-VLM pre-trained in half precision, all else ran in float32; pass `bf16=True`), the size of
images or the regions, and the collator. On fewer GPUs prefer a larger batch per device to gradient
accumulation, which does not make up for negatives.
"""

from .arguments import VLPTrainingArguments

# X-VLM. The official fine-tuning configurations double the rate of new parameters too, but their optimizer
# does not see which those are on more than one GPU.
_XVLM = {
    "learning_rate": 3e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,  # share of all steps
    "weight_decay": 0.01,
    "adam_beta1": 0.9,
    "adam_beta2": 0.98,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 0.0,  # fine-tuning does not clip
    "official_adamw": True,
}

# The official code counts image steps and puts a region step before half of them; here each of both is an
# optimizer step, and the schedule runs over all of them: 3/2 of the published numbers.
_XVLM_PRETRAINING = _XVLM | {
    "learning_rate": 1e-4,
    "new_parameter_lr_multiplier": 2.0,
    "warmup_steps": 3_750,  # 2,500 image steps
    "max_grad_norm": 1.0,
    "region_probability": 0.5,
    "per_device_region_batch_size": 48,  # images, of which the collator keeps 128 region-text pairs
    "per_device_train_batch_size": 128,
}

# One rate for all parameters, no clipping. The official schedules hold the rate through each epoch, and warm
# up in jumps of 100 steps; here both change at every step.
_ALBEF = {
    "learning_rate": 2e-5,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr": 1e-6},
    "weight_decay": 0.02,
    "max_grad_norm": 0.0,
    "alpha_ramp_epochs": 1.0,
}
_ALBEF_RETRIEVAL = _ALBEF | {"learning_rate": 1e-5, "per_device_train_batch_size": 32}
_ALBEF_PRETRAINING = _ALBEF | {"lr_scheduler_kwargs": {"min_lr": 1e-5}, "per_device_train_batch_size": 64}

# LXMERT. Its recipes are those of the released code. 20 tokens, 36 regions of each image.
_LXMERT = {
    "bert_adam": True,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,  # share of all steps
    "weight_decay": 0.01,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 5.0,
    "per_device_train_batch_size": 32,
    "num_train_epochs": 4,
    "seed": 9595,
}
_LXMERT_PRETRAINING = _LXMERT | {
    "learning_rate": 1e-4,
    "warmup_steps": 0.05,
    "max_grad_norm": 1.0,
    "per_device_train_batch_size": 64,
    "num_train_epochs": 20,
}

# SOHO. Images are rows: one of the pretraining has 4 captions. The released code accumulates two batches; its
# 1,000 iterations of warm-up are 500 steps.
_SOHO = {
    "sgd_adamw": True,
    "learning_rate": 1e-4,
    "trunk_learning_rate": 1e-2,
    "lr_milestone_factor": 0.1,
    "warmup_steps": 500,
    "weight_decay": 0.01,
    "trunk_weight_decay": 1e-4,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 4.0,
}
_SOHO_PRETRAINING = _SOHO | {
    "max_grad_norm": 10.0,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 40,
    "lr_milestones": [25.0, 35.0],
    "group_by_orientation": True,
}
_SOHO_VQA = _SOHO | {
    "per_device_train_batch_size": 32,
    "lr_milestones": [12.0, 16.0],
    "group_by_orientation": True,
}

RECIPES: dict[str, dict] = {
    # ALBEF section 3: 256 pixels, 25 tokens. Global batch 512 pairs (64 x 8 GPUs).
    "albef_pretrain": dict(_ALBEF_PRETRAINING, learning_rate=1e-4, warmup_steps=2_000, num_train_epochs=30),
    # The step before NLVR2, on the images and captions of the pretraining.
    "albef_text_assignment": dict(
        _ALBEF_PRETRAINING, warmup_steps=100, num_train_epochs=1, alpha_ramp_epochs=0.0
    ),
    # 384 pixels from here on. Global batch 256 pairs or questions (32 x 8 GPUs), of NLVR2 128 (16 x 8).
    "albef_retrieval_coco": dict(_ALBEF_RETRIEVAL, num_train_epochs=5),
    "albef_retrieval_flickr": dict(_ALBEF_RETRIEVAL, num_train_epochs=10),
    # Texts as captions, images squashed without a crop: RetrievalCollator(crop_scale=None).
    "albef_grounding_refcoco": dict(_ALBEF_RETRIEVAL, num_train_epochs=5),
    "albef_vqa": dict(_ALBEF, per_device_train_batch_size=32, warmup_steps=400, num_train_epochs=8),
    "albef_entailment": dict(
        _ALBEF, per_device_train_batch_size=32, warmup_steps=100, num_train_epochs=5, alpha_ramp_epochs=0.0
    ),
    "albef_reasoning": dict(_ALBEF, per_device_train_batch_size=16, warmup_steps=100, num_train_epochs=10),
    # LXMERT sections 3 and 4, from scratch. Global batch 256 pairs (64 x 4 GPUs). The released code trains on
    # the answers from the beginning, the paper's ten epochs without them went before ten at twice the weight.
    "lxmert_pretrain": dict(_LXMERT_PRETRAINING, answer_loss_weights=[1.0]),
    "lxmert_pretrain_paper": dict(_LXMERT_PRETRAINING, answer_loss_weights=[0.0] * 10 + [2.0] * 10),
    # One GPU each; of the epochs keep the best on the validation rows.
    "lxmert_vqa": _LXMERT,
    "lxmert_gqa": dict(_LXMERT, learning_rate=1e-5),
    "lxmert_nlvr2": _LXMERT,
    # Not in the paper; as its author advises (airsplay/lxmert issue 58).
    "lxmert_vizwiz": dict(_LXMERT, learning_rate=1e-4, per_device_train_batch_size=64, num_train_epochs=20),
    # SOHO. 600 to 1,000 pixels, 16 tokens. Global batch 256 images with 4 captions each (16 x 2 x 8 GPUs);
    # the paper's 1,024 (16 x 2 x 32), its CNN frozen for ten epochs.
    "soho_pretrain": _SOHO_PRETRAINING,
    "soho_pretrain_paper": dict(_SOHO_PRETRAINING, trunk_weight_decay=5e-4, freeze_trunk_epochs=10.0),
    # Global batch 512 questions (32 x 2 x 8 GPUs); the paper's 256 (32 x 8).
    "soho_vqa": dict(_SOHO_VQA, gradient_accumulation_steps=2, num_train_epochs=20),
    "soho_vqa_paper": dict(_SOHO_VQA, num_train_epochs=18),
    # Only the paper has these; what it does not tell, as clipping and warm-up, is as for VQA. Global batch
    # 128 pairs or sentences (16 x 8 GPUs), of retrieval 24 pairs on each.
    "soho_nlvr2": dict(
        _SOHO, per_device_train_batch_size=16, num_train_epochs=18, lr_milestones=[12.0, 16.0]
    ),
    "soho_entailment": dict(_SOHO, per_device_train_batch_size=16, num_train_epochs=6, lr_milestones=[4.0]),
    "soho_retrieval": dict(
        _SOHO,
        per_device_train_batch_size=24,
        num_train_epochs=20,
        lr_milestones=[3.0, 5.0, 9.0, 13.0],
        lr_milestone_factor=0.5,
    ),
    # X-VLM section 4: 224 pixels, 40 words, 8 masks, 41 epochs of 5,114,489 images or 204,795 image steps.
    # Global batch 1,024 images (128 x 8 GPUs), 1,024 region-text pairs.
    "xvlm_pretrain_4m": dict(_XVLM_PRETRAINING, max_steps=307_193),
    # 224 pixels, 30 words, 6 masks, 38 epochs of 16,219,845 images or 200,640 image steps.
    # Global batch 3,072 images (128 x 24 GPUs), 3,072 region-text pairs.
    "xvlm_pretrain_16m": dict(_XVLM_PRETRAINING, max_steps=300_960),
    # 384 pixels, 30 words. Global batch 160 pairs (20 x 8 GPUs).
    "xvlm_retrieval_coco": dict(_XVLM, per_device_train_batch_size=20, num_train_epochs=10),
    "xvlm_retrieval_flickr": dict(_XVLM, per_device_train_batch_size=20, num_train_epochs=10),
    # The step before RefCOCO+: 224 pixels, regions only, 2 epochs of 318,547 / 192 steps. Global batch 192
    # region-text pairs (24 x 8 GPUs) of at most 72 images (9 x 8); the rows that are counted here are images.
    # Collate with RegionGroundingCollator(max_pairs=24).
    "xvlm_grounding_pretrain": dict(_XVLM, per_device_train_batch_size=9, max_steps=3_320, max_grad_norm=1.0),
    # RefCOCO+: 384 pixels, 30 words. Global batch 160 texts (20 x 8 GPUs).
    "xvlm_grounding_refcoco": dict(_XVLM, per_device_train_batch_size=20, num_train_epochs=10),
    # Without boxes: its texts as captions, in a retrieval head. Global batch as above.
    "xvlm_grounding_weak": dict(
        _XVLM, learning_rate=2e-5, per_device_train_batch_size=20, num_train_epochs=5
    ),
    # 384 pixels, or 480 for half a point more. Global batch 192 questions (24 x 8 GPUs). Here the official
    # optimizer does see that the decoder's keys and values are new.
    "xvlm_vqa": dict(
        _XVLM,
        learning_rate=5e-5,
        new_parameter_lr_multiplier=2.0,
        per_device_train_batch_size=24,
        num_train_epochs=10,
    ),
    # The step before NLVR2, text assignment. Its configuration was not released; this is that of the other
    # steps of this kind: 224 pixels, global batch 1,024 pairs (128 x 8 GPUs).
    "xvlm_nlvr_pretrain": dict(_XVLM, per_device_train_batch_size=128, num_train_epochs=2, max_grad_norm=1.0),
    # NLVR2: 384 pixels, 30 words. Global batch 80 pairs of images (10 x 8 GPUs).
    "xvlm_nlvr": dict(_XVLM, per_device_train_batch_size=10, num_train_epochs=10),
    # Not in the paper: X-VLM's optimizer, ALBEF's batch and epochs.
    "xvlm_entailment": dict(_XVLM, per_device_train_batch_size=32, num_train_epochs=5),
    # Captions. The step before: 224 pixels, 40 words, no prompt, no smoothing, 2 epochs of 5,114,489 pairs.
    # Global batch 1,024 pairs (128 x 8 GPUs).
    "xvlm_caption_pretrain": dict(_XVLM, per_device_train_batch_size=128, max_steps=9_990, max_grad_norm=1.0),
    # COCO: 384 pixels, 5 epochs of 566,747 captions. Global batch 256 captions (32 x 8 GPUs).
    "xvlm_caption": dict(_XVLM, learning_rate=1e-5, per_device_train_batch_size=32, max_steps=11_070),
    # With `SelfCriticalTrainer`: 5 epochs. Global batch 64 images with 5 samples each (8 x 8 GPUs).
    "xvlm_caption_scst": dict(_XVLM, learning_rate=1e-5, per_device_train_batch_size=8, max_steps=44_275),
}


def recipe(name: str, output_dir: str, **overrides) -> VLPTrainingArguments:
    """Arguments of a paper's training, with `overrides` of any field of `VLPTrainingArguments`.

    Raises:
        ValueError: there is no recipe `name`.
    """
    if name not in RECIPES:
        raise ValueError(f"name is {name!r}; the recipes are {', '.join(RECIPES)}")
    return VLPTrainingArguments(output_dir=output_dir, **(RECIPES[name] | overrides))
