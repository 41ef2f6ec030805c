"""Flags to compile for CPUs in a third of the time: without the newer way of writing fusions."""

from importlib import metadata

# The switch is gone from later versions, which end every process that names it.
_KNOWN = tuple(map(int, metadata.version("jaxlib").split(".")[:2])) < (0, 11)
FLAG = "--xla_cpu_use_fusion_emitters=false" if _KNOWN else ""
AS_USERS = {"xla_cpu_use_fusion_emitters": True} if _KNOWN else {}  # options of one program
