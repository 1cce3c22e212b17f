"""From a model and its tasks to scores: prediction, answer extraction, metrics, balance across tasks."""
