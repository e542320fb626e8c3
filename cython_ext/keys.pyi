from typing import Any

import numpy as np
import numpy.typing as npt

def xxh3_64(data: Any, seed: int = 0) -> int: ...
def chain_keys(
    tokens: npt.NDArray[np.uint32],
    block_size: int,
    root_key: int,
    extras: npt.NDArray[np.uint64] | None = None,
) -> npt.NDArray[np.uint64]: ...
