"""One multi-task run on the transformers Trainer, with checkpoints that resume bit-exactly.

Called by the command line, `comparison`, `federated.site` and `analysis`; knows nothing of evaluation.
"""
