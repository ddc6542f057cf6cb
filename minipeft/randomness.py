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


def key_of(seed: int, user: str, *purpose: str | int) -> int:
    """64 bits that belong to (seed, user, purpose): the start of cheaper draws, see keys_of."""
    return int(generator(seed, user, *purpose).integers(2**64, dtype=np.uint64))


def keys_of(keys: np.ndarray, steps: np.ndarray, site: str) -> np.ndarray:
    """A key for each user's step and site: [S] int64, from the users' own keys [S] uint64 and steps [S].

    splitmix64's finaliser (Steele et al. 2014, "Fast splittable pseudorandom number generators") over their sum.
    """
    of_site = int.from_bytes(hashlib.sha256(site.encode()).digest()[:8], "little")
    mixed = keys ^ (np.uint64(of_site) + (steps.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return (mixed ^ (mixed >> np.uint64(31))).view(np.int64)
