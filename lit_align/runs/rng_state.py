"""Random number generator states of every rank, for random rewards and callbacks of the user."""

import random
from typing import Any

import numpy as np
import torch
from torch import distributed

RNGState = dict[str, Any]  # tensors and numbers only: a checkpoint loads with weights_only


def rng_state() -> RNGState:
    """Return the generator states of Python, numpy, torch and this rank's devices.

    Example:
        >>> state = rng_state()
        >>> before = random.random()
        >>> set_rng_state(state)
        >>> random.random() == before
        True
    """
    version, words, spare = random.getstate()
    legacy: Any = np.random.get_state(legacy=False)
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": {"version": version, "words": torch.tensor(words), "spare": spare},
        "numpy": {
            "key": torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
            "position": int(legacy["state"]["pos"]),
            "has_spare": int(legacy["has_gauss"]),
            "spare": float(legacy["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "devices": devices,
    }


def set_rng_state(found: RNGState) -> None:
    """Restore the generator states. Device states need the same number of devices."""
    python, legacy = found["python"], found["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["spare"]))
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {
                "key": legacy["key"].numpy().astype(np.uint32),
                "pos": legacy["position"],
            },
            "has_gauss": legacy["has_spare"],
            "gauss": legacy["spare"],
        }
    )
    torch.set_rng_state(found["torch"].cpu())
    if torch.cuda.is_available() and len(found["devices"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(found["devices"])


def gather_rng_states() -> list[RNGState]:
    """Return the `rng_state` of each rank, by rank. A collective: every rank must call it."""
    own = rng_state()
    if not (distributed.is_available() and distributed.is_initialized()):
        return [own]
    states: list[RNGState] = [own] * distributed.get_world_size()
    distributed.all_gather_object(states, own)
    return states
