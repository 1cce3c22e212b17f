"""Adapters of any kind as LoRAs that PEFT loads without braidlora, or merged into their base."""
