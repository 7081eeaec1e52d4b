"""Rows of `datasets.Dataset` turned into batches: scenes, readers, masking, transforms, collators, mixing."""
