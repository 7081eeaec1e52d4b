"""Checks of what the models are given, each a ValueError with its remedy."""

import torch
from torch import Tensor


def check_pairs(num_images: int, input_ids: Tensor):
    """One text (R, L) for each of `num_images` images or regions."""
    if num_images != len(input_ids):
        raise ValueError(
            f"input_ids has {len(input_ids)} texts for {num_images} images or regions; give one text for "
            "each, or tell the image of each text with region_image_index"
        )


def check_ids(image_ids: Tensor | None, input_ids: Tensor):
    """One id (R,) for each text, if there are any."""
    if image_ids is not None and image_ids.shape != (len(input_ids),):
        raise ValueError(
            f"image_ids is {tuple(image_ids.shape)} for {len(input_ids)} pairs; give one integer id per pair"
        )


def check_index(region_image_index: Tensor, num_images: int):
    """No region or text (R,) names an image that is not there."""
    if (
        not torch.compiler.is_compiling()
        and len(region_image_index)
        and int(region_image_index.max()) >= num_images
    ):
        raise ValueError(
            f"region_image_index names image {int(region_image_index.max())}, but pixel_values holds "
            f"{num_images} images; count images from 0 within the batch"
        )


def check_regions(image_embeds: Tensor, region_image_index: Tensor, region_patch_mask: Tensor | None):
    """Masks (R, N) fit the patches of image embeds (B, 1 + N, W); regions (R,) name images that are there."""
    expected = (len(region_image_index), image_embeds.shape[1] - 1)
    if region_patch_mask is None or tuple(region_patch_mask.shape) != expected:
        got = None if region_patch_mask is None else tuple(region_patch_mask.shape)
        raise ValueError(
            f"region_patch_mask is {got}, but region_image_index and the image trunk ask for {expected} "
            "(regions, patches); make it with the model's processor"
        )
    check_index(region_image_index, len(image_embeds))
