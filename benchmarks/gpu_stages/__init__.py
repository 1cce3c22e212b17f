"""The stages of benchmarks/gpu.py, one module each: `python -m gpu_stages.STAGE --device cuda|cpu --out FILE`."""
