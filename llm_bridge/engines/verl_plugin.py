"""Imported by verl in each of its processes: VERL_USE_EXTERNAL_MODULES=preflab.llm_bridge.engines.verl_plugin."""

from .verl import register

NAMES = register()
