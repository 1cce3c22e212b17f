"""Adapters of braidlora as LoRA modules of vLLM, in one batch with plain LoRAs and the base model.

vLLM calls `register` in every one of its processes (entry point `vllm.general_plugins`). Imports vLLM only then.
"""

from __future__ import annotations

import logging

# Where the tests of `make acceptance-vllm` have passed.
TESTED = ("0.28.0", "0.32.0")

logger = logging.getLogger("vllm.plugins.braidlora")


def register() -> None:
    """Let this process of vLLM load adapters of braidlora. May be called any number of times.

    If a part of vLLM that this builds on has another signature, vLLM keeps working for everyone else, and an adapter of
    braidlora is rejected with a message that says why.
    """
    from braidlora.serving.vllm import seams

    if seams.installed():
        return
    problems = seams.problems()
    if not problems:
        from braidlora.serving.vllm import folders, loading, wrapper

        loading.install()
        wrapper.install()
        folders.install()
        return
    reason = seams.refusal(problems)
    logger.warning("%s Adapters of braidlora will be rejected.", reason)
    seams.refuse_all(reason)
