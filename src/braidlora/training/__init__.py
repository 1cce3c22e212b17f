"""One multi-task run on the transformers Trainer, with checkpoints that resume to the bit.

Called by the command line, `comparison`, `federated.site` and `analysis`; knows nothing of evaluation.
"""
