"""Base models and tokenizers, their fingerprints, and the reader and writer of adapter folders.

Called by `training`, `evaluation`, `federated.site`, `analysis`, `export` and `plan`; calls `tasks` and `adapters`.
"""
