"""Adapters behind an HTTP server: the vLLM plugin, and the command that starts a server for adapters by name.

Called by the command line and, for `vllm`, by vLLM itself; `serving.vllm` imports vLLM, nothing else here does.
"""
