"""Weights and training state on disk, without a layout: own checkpoints, Hugging Face directories, GGUF files."""
