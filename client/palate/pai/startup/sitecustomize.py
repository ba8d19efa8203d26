"""Runs in a script's process before the script: installs `pai` and leaves no other trace. Knows no script.

`palate.pai` puts this folder first on PYTHONPATH; Python imports `sitecustomize` from there by itself.
"""

import os
import sys
from importlib import import_module

_here = os.path.dirname(os.path.abspath(__file__))
_others = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry and entry != _here]
if _others:
    os.environ["PYTHONPATH"] = os.pathsep.join(_others)
else:
    os.environ.pop("PYTHONPATH", None)
sys.path[:] = [entry for entry in sys.path if entry != _here]

_this = sys.modules.pop("sitecustomize", None)
try:
    import_module("sitecustomize")  # the one that this file shadows, such as the distribution's
except ModuleNotFoundError as error:
    if error.name != "sitecustomize":
        raise
finally:
    if _this is not None:
        sys.modules.setdefault("sitecustomize", _this)

try:
    import_module("palate.pai").install()
except Exception as error:
    # Python would only print the error and continue. But the script must not run with PAI's own SDK.
    print(f"error: pai cannot be provided to this script: {error}", file=sys.stderr, flush=True)
    os._exit(1)
