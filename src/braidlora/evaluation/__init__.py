"""From a model and its tasks to scores: prediction, answer extraction, metrics, balance across tasks.

Called by the command line, `comparison`, `federated.site` and `export`; knows nothing of training.
"""
