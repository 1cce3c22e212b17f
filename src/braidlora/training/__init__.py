"""One multi-task run on the transformers Trainer, with checkpoints that resume to the bit."""
