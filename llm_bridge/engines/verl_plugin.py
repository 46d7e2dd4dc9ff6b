"""Imported by verl in each of its processes: VERL_USE_EXTERNAL_MODULES=preflab.llm_bridge.engines.verl_plugin.

Where there is no verl there is nothing to register in, and NAMES is empty; a verl that cannot be imported is an error.
"""

import importlib.util
import sys

from .verl import register

NAMES = register() if "verl" in sys.modules or importlib.util.find_spec("verl") else []
