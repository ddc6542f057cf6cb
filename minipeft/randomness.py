"""Randomness belongs to the user: every draw is a pure function of (seed, user, what it is for).

Never of batch order, of who else trains, or of how many draws came before. The generator is numpy's Philox 4x64
(Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), counter-based, keyed by a hash of the names.
"""

import hashlib

import numpy as np


def generator(seed: int, user: str, *purpose: str | int) -> np.random.Generator:
    """The random generator of this user for this purpose, e.g. generator(0, "ann", "shuffle", epoch).

    The key is the first 16 bytes of the sha256 of all parts, each with its length before it, so ("a", "bc") and
    ("ab", "c") differ.
    """
    digest = hashlib.sha256()
    for part in (seed, user, *purpose):
        encoded = repr(part).encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest.digest()[:16], "little")))
