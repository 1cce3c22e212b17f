"""Where the benchmarks' datasets and models are: imported for its effect, before a recipe is read.

`BRAIDLORA_DATA` is left alone where it is set; otherwise it becomes `../shared` next to the repository, if that exists.
"""

import os
from pathlib import Path

_DATA = Path(__file__).parents[2] / "shared"
if "BRAIDLORA_DATA" not in os.environ and _DATA.is_dir():
    os.environ["BRAIDLORA_DATA"] = str(_DATA)
