"""`FactoredLoraModel`: puts factored LoRA layers into a model, as a PEFT tuner."""

from __future__ import annotations

from braidlora.adapters._factored_config import FactoredLoraConfig
from braidlora.adapters._factored_layer import FactoredLoraLayer
from braidlora.adapters._registration import FACTORED_NAME, FACTORED_PREFIX, register
from braidlora.adapters._tuner import LinearTuner


class FactoredLoraLinear(FactoredLoraLayer):
    """The layer that replaces a linear layer.

    The name matters: PEFT includes an adapted layer in "all-linear" if its class name contains "Linear".
    """


class FactoredLoraModel(LinearTuner):
    """PEFT tuner of type FACTOREDLORA; `peft.get_peft_model` with a `FactoredLoraConfig` makes one.

    Raises:
        ConfigError: `target_modules` match nothing, or something that is not a linear layer.
    """

    prefix = FACTORED_PREFIX
    tuner_layer_cls = FactoredLoraLayer
    linear_cls = FactoredLoraLinear


register(FACTORED_NAME, FACTORED_PREFIX, FactoredLoraConfig, FactoredLoraModel)
