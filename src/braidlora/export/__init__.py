"""Adapters of any kind as LoRAs that PEFT loads without braidlora, or merged into their base.

Called by the command line; imports models, tasks, adapters and evaluation.
"""
