"""Training of the checkpoint series that are merged: fine-tuning (SFT) and GRPO."""
