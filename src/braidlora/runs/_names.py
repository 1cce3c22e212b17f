"""Names of files that more than one room reads or writes, each spelled once."""

# An adapter folder: PEFT's three files, and ours.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODEL_CARD = "README.md"
ADAPTER_CARD = "braidlora.json"

# A run directory.
RECIPE = "config.yaml"
ENVIRONMENT = "environment.json"
DATA = "data.json"
LABELS = "labels.json"
LOG = "log.jsonl"
METRICS = "metrics.json"
PREDICTIONS = "predictions"

# A federation at sites that went back to an earlier round.
ROLLED_BACK = "rolled_back.json"

# A checkpoint: what makes two runs the same run.
IDENTITY = "identity.json"

# A base model, as transformers saves it.
BASE_CONFIG = "config.json"
