"""Whether the Hugging Face hub, or its cache on this machine, has a model. Imports no torch.

huggingface_hub's own downloads retry for half a minute and log each try, which is right for a download that broke off
and wrong for a machine without a network. Here the hub is asked twice at most, and in silence.
"""

from __future__ import annotations

import functools
import time
from typing import Literal

from braidlora.runs import BASE_CONFIG

Answer = Literal["has", "lacks", "unreachable"]
_TIMEOUT = 10.0  # seconds for the hub to answer
_TRIES, _PAUSE = 2, 0.5  # seconds between two tries


@functools.cache
def ask_hub(name: str, revision: str | None = None) -> Answer:
    """What the hub says about a model; its cache comes first, and is all that counts with HF_HUB_OFFLINE.

    `has` includes models that cannot be read (gated, another revision, an error of the server): loading explains why.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        if try_to_load_from_cache(name, BASE_CONFIG, revision=revision) is not None:
            return "has"
        url = hf_hub_url(name, BASE_CONFIG, revision=revision)
    except ValueError:
        return "lacks"  # not a name at all
    for left in reversed(range(_TRIES)):
        try:
            get_hf_file_metadata(url, timeout=_TIMEOUT)
            return "has"
        except GatedRepoError:
            return "has"
        except RepositoryNotFoundError:
            return "lacks"
        except HfHubHTTPError:
            return "has"
        except OfflineModeIsEnabled:
            break
        except (
            Exception
        ):  # of the library below, httpx or requests by huggingface_hub's version, or an OSError
            if left:
                time.sleep(_PAUSE)
    return "unreachable"
