"""preflab runs the theorems of RLHF.

Rooms, each importing only from those before it: `preflab.envs` (exact worlds), `preflab.algorithms` (one file a
method), `preflab.theory` (claims and verdicts), `preflab.llm_bridge` (the same objects on language models).
"""

from pathlib import Path as _Path

__version__ = "0.3.0"

_root = _Path(__file__).resolve().parents[2]
if (_root / "pyproject.toml").is_file() and (_root / "envs" / "__init__.py").is_file():
    # In a checkout the rooms lie at the repository's top level; an installed wheel has them beside this file.
    __path__.append(str(_root))
del _root
