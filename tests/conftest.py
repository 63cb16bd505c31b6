"""The suite runs on a CPU that shows itself as 8 devices, so that meshes can be tested anywhere."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
_COUNT = "--xla_force_host_platform_device_count=8"
if _COUNT not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_COUNT}".strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
