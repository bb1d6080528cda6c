"""What tests, and the processes that they start, are told about XLA.

Enters: a number of devices. Leaves: XLA_FLAGS. The programs of tests are small: compiling
them well takes several times longer than running them badly. None of this reaches the TPU
compiler, nor the libraries that multiply matrices. To have them compiled as users' are:

    XLA_FLAGS="--xla_backend_optimization_level=3 --xla_cpu_use_fusion_emitters=true" make test
"""

import importlib.metadata

LEAST = "--xla_backend_optimization_level=0"
# XLA ends a process over a flag that it does not know, and such flags come and go.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    LEAST += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def xla_flags(devices: int = 1) -> str:
    """For that many simulated CPU devices, compiled with the least effort."""
    return f"--xla_force_host_platform_device_count={devices} {LEAST}"
