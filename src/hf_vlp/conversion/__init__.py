"""Official checkpoints to folders that `from_pretrained` reads."""
